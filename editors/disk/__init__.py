"""Checkpoint folders and adapters as they lie on disk, read strictly."""
