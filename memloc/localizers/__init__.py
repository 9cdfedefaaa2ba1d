"""Localizers: where it is kept. One file a method; the table is memloc/methods.py."""
