"""The tables of localizers and measures: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

LOCALIZERS = Registry(
    "localizer",
    {
        "activation": "memloc.localizers.activation:Activation",
        "hard-concrete": "memloc.localizers.hard_concrete:HardConcrete",
        "integrated-gradients": "memloc.localizers.integrated_gradients:IntegratedGradients",
        "outlier-set": "memloc.localizers.outlier_set:OutlierSet",
        "random": "memloc.localizers.random:Random",
        "slimming": "memloc.localizers.slimming:Slimming",
        "weight-gradient": "memloc.localizers.weight_gradient:WeightGradient",
        "zero-out": "memloc.localizers.zero_out:ZeroOut",
    },
)

MEASURES = Registry(
    "measure",
    {
        "extraction": "memloc.measures.extraction:Extraction",
        "facts": "memloc.measures.facts:FactRecall",
        "perplexity": "memloc.measures.perplexity:Perplexity",
    },
)
