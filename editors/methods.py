"""The table of editors: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

EDITORS = Registry(
    "editor",
    {
        "forget-passage": "editors.rewriters.forget_passage:ForgetPassage",
        "knowledge-neuron-surgery": "editors.rewriters.knowledge_neuron_surgery:KnowledgeNeuronSurgery",
        "balanced-subnet": "editors.pruners.balanced_subnet:BalancedSubnet",
        "durable": "editors.pruners.durable:Durable",
        "greedy": "editors.pruners.greedy:Greedy",
        "head-dropout": "editors.pruners.head_dropout:HeadDropout",
        "magnitude": "editors.pruners.magnitude:Magnitude",
        "mend": "editors.rewriters.mend:Mend",
        "neuron-dropout": "editors.pruners.neuron_dropout:NeuronDropout",
        "obs": "editors.pruners.obs:Obs",
        "random": "editors.pruners.random:Random",
        "rome": "editors.rewriters.rome:Rome",
        "sparse-fine-tune": "editors.rewriters.sparse_fine_tune:SparseFineTune",
        "ultraedit": "editors.rewriters.ultraedit:UltraEdit",
        "subnet": "editors.pruners.subnet:Subnet",
        "subspace": "editors.pruners.subspace:Subspace",
    },
)
