"""Runs corrupted and patched: exactly, to first order, token by token."""
