"""The arithmetic of every method: tensors in, tensors out, no model."""
