"""Readers for the files people already have, recognised by what is in them, and writers of others' result files.

`opening` opens a file without running anything in it (`arrays`, `records`); `rewrites`, `ripple`, `cloze`, `texts` and
`matrices` say what a record of their family means; `table` recognises and reads; `data` serves commands that take a
file; `results` writes.
"""
