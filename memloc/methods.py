"""The tables of localizers and measures: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

LOCALIZERS = Registry(
    "localizer",
    {
        "activation": "memloc.localizers.activation:Activation",
        "attention-bypass": "memloc.localizers.attention_bypass:AttentionBypass",
        "ffn-memory": "memloc.localizers.ffn_memory:FfnMemory",
        "integrated-gradients": "memloc.localizers.integrated_gradients:IntegratedGradients",
        "random": "memloc.localizers.random:Random",
        "rare-token-heads": "memloc.localizers.rare_token_heads:RareTokenHeads",
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
