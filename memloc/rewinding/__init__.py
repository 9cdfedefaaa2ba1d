"""Layers put back to an earlier checkpoint, its tensors read one at a time."""
