"""The verbs that write, one file each; `editors/cli.py` is their table."""
