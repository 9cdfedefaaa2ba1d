"""Measures: what is memorized, and what else a model can do. One file each; the table is memloc/methods.py."""
