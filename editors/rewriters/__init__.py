"""Rewriters: editors that compute new values for weights. The table is editors/methods.py."""
