"""The table of editors: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

EDITORS = Registry(
    "editor",
    {
        "forget-passage": "editors.rewriters.forget_passage:ForgetPassage",
        "knowledge-neuron-surgery": "editors.rewriters.knowledge_neuron_surgery:KnowledgeNeuronSurgery",
        "neuron-dropout": "editors.pruners.neuron_dropout:NeuronDropout",
        "rome": "editors.rewriters.rome:Rome",
        "sparse-fine-tune": "editors.rewriters.sparse_fine_tune:SparseFineTune",
        "ultraedit": "editors.rewriters.ultraedit:UltraEdit",
    },
)
