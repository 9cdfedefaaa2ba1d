"""Editors: change the weights that hold a memory. They write and never decide where."""
