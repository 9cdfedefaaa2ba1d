"""Readers for the files people already have, recognised by what is in them, and writers of others' result files.

`content` opens a file without running anything in it; one file a family of formats says what a record of that family
means; `table` recognises and reads; `results` writes.
"""
