"""Pruners: editors that silence or scale what a selection names. The table is editors/methods.py."""
