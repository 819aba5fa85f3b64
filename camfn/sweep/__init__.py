"""Many perturbed inputs, scored: masked images, or changed activations at a layer."""
