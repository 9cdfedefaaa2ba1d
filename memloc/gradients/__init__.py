"""Gradients by activations and weights, along paths, folded, and the curvature of the loss."""
