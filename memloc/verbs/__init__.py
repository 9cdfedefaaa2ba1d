"""The verbs that look, one file each; `memloc/cli.py` is their table."""
