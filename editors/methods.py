"""The table of editors: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

EDITORS = Registry(
    "editor",
    {
        "alphaedit": "editors.rewriters.alphaedit:AlphaEdit",
        "emmet": "editors.rewriters.emmet:Emmet",
        "memit": "editors.rewriters.memit:Memit",
        "neuron-dropout": "editors.pruners.neuron_dropout:NeuronDropout",
        "rome": "editors.rewriters.rome:Rome",
        "sparse-fine-tune": "editors.rewriters.sparse_fine_tune:SparseFineTune",
    },
)
