"""The model run: on cached prefixes, from the middle, by itself; who attends to whom; what comes out."""
