"""Scoring of many perturbed inputs: masked images, or changed activations at a layer."""
