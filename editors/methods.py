"""The table of editors: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

EDITORS = Registry(
    "editor",
    {
        "curvature": "editors.pruners.curvature:Curvature",
        "fuse": "editors.rewriters.fuse:Fuse",
        "layer-rewind": "editors.pruners.layer_rewind:LayerRewind",
        "layernorm-removal": "editors.pruners.layernorm_removal:LayernormRemoval",
        "neuron-dropout": "editors.pruners.neuron_dropout:NeuronDropout",
        "rome": "editors.rewriters.rome:Rome",
        "sparse-fine-tune": "editors.rewriters.sparse_fine_tune:SparseFineTune",
        "svd": "editors.pruners.svd:Svd",
        "task-vector": "editors.rewriters.task_vector:TaskVector",
    },
)
