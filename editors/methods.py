"""The table of editors: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

EDITORS = Registry(
    "editor",
    {
        "forget-passage": "editors.rewriters.forget_passage:ForgetPassage",
        "neuron-dropout": "editors.pruners.neuron_dropout:NeuronDropout",
        "rome": "editors.rewriters.rome:Rome",
        "sparse-fine-tune": "editors.rewriters.sparse_fine_tune:SparseFineTune",
    },
)
