"""Every exception raised on purpose, by who must act. The command line prints the message and exits with 2.

MemlocError
├── InputError        the caller: a passage, a fact, a flag or a setting cannot be used as given
│   └── UnknownName   a method, a family or a field that no table holds (near names are suggested)
├── ModelError        the model: a family with no row, a row that fails its proof, quantised, offloaded, not finite
├── CheckpointError   a checkpoint folder: missing, truncated, pickled, inconsistent, names that leave it
├── ArtifactError     one of our own files (localization, edit, measurement) cannot be read
├── MismatchError     two things that do not belong together: digests, grains, datasets
└── TargetError       where a result should be written: occupied, unwritable, full

A message says where, found against expected, what to do next, and whether anything was changed; one line.
"""

from __future__ import annotations


class MemlocError(Exception):
    """Base of every error raised on purpose."""


class InputError(MemlocError):
    """A passage, fact, flag or setting cannot be used as given."""


class UnknownName(InputError):  # noqa: N818 - reads as what it says: `except UnknownName`
    """A name that no table holds."""


class ModelError(MemlocError):
    """The model cannot be looked at as it is."""


class CheckpointError(MemlocError):
    """A checkpoint folder cannot be read safely."""


class ArtifactError(MemlocError):
    """A file that memloc should have written cannot be read."""


class MismatchError(MemlocError):
    """Two things that do not belong together."""


class TargetError(MemlocError):
    """A result cannot be written where it was asked for."""
