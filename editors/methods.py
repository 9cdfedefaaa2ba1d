"""The table of editors: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

EDITORS = Registry(
    "editor",
    {
        "alphaedit": "editors.rewriters.alphaedit:AlphaEdit",
        "balanced-subnet": "editors.pruners.balanced_subnet:BalancedSubnet",
        "constrained-fine-tune": "editors.rewriters.constrained_fine_tune:ConstrainedFineTune",
        "curvature": "editors.pruners.curvature:Curvature",
        "durable": "editors.pruners.durable:Durable",
        "emmet": "editors.rewriters.emmet:Emmet",
        "fine-tune": "editors.rewriters.fine_tune:FineTune",
        "forget-passage": "editors.rewriters.forget_passage:ForgetPassage",
        "fuse": "editors.rewriters.fuse:Fuse",
        "gradient-ascent": "editors.rewriters.gradient_ascent:GradientAscent",
        "gradient-difference": "editors.rewriters.gradient_difference:GradientDifference",
        "greedy": "editors.pruners.greedy:Greedy",
        "head-dropout": "editors.pruners.head_dropout:HeadDropout",
        "knowledge-neuron-surgery": "editors.rewriters.knowledge_neuron_surgery:KnowledgeNeuronSurgery",
        "layer-rewind": "editors.pruners.layer_rewind:LayerRewind",
        "layernorm-removal": "editors.pruners.layernorm_removal:LayernormRemoval",
        "magnitude": "editors.pruners.magnitude:Magnitude",
        "memit": "editors.rewriters.memit:Memit",
        "mend": "editors.rewriters.mend:Mend",
        "neuron-dropout": "editors.pruners.neuron_dropout:NeuronDropout",
        "npo": "editors.rewriters.npo:Npo",
        "obs": "editors.pruners.obs:Obs",
        "pmet": "editors.rewriters.pmet:Pmet",
        "random": "editors.pruners.random:Random",
        "rmu": "editors.rewriters.rmu:Rmu",
        "rome": "editors.rewriters.rome:Rome",
        "simnpo": "editors.rewriters.simnpo:Simnpo",
        "sparse-fine-tune": "editors.rewriters.sparse_fine_tune:SparseFineTune",
        "subnet": "editors.pruners.subnet:Subnet",
        "subspace": "editors.pruners.subspace:Subspace",
        "svd": "editors.pruners.svd:Svd",
        "task-vector": "editors.rewriters.task_vector:TaskVector",
        "ultraedit": "editors.rewriters.ultraedit:UltraEdit",
    },
)

PRUNERS = Registry(
    "pruner",
    {
        name: f"{module}:{method}"
        for name, (module, method) in ((name, EDITORS.target(name)) for name in EDITORS)
        if module.startswith("editors.pruners.")
    },
)
"""Those editors that only take weights away."""
