"""The tables of localizers and measures: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

LOCALIZERS = Registry(
    "localizer",
    {
        "activation": "memloc.localizers.activation:Activation",
        "activation-patching": "memloc.localizers.activation_patching:ActivationPatching",
        "attribution-patching": "memloc.localizers.attribution_patching:AttributionPatching",
        "causal-trace": "memloc.localizers.causal_trace:CausalTrace",
        "integrated-gradients": "memloc.localizers.integrated_gradients:IntegratedGradients",
        "prefix-perturbation": "memloc.localizers.prefix_perturbation:PrefixPerturbation",
        "random": "memloc.localizers.random:Random",
        "weight-gradient": "memloc.localizers.weight_gradient:WeightGradient",
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
