"""The tables of localizers and measures: one line each. A method is one file and one line here."""

from __future__ import annotations

from memloc.registry import Registry

LOCALIZERS = Registry(
    "localizer",
    {
        "activation": "memloc.localizers.activation:Activation",
        "activation-gradient": "memloc.localizers.activation_gradient:ActivationGradient",
        "activation-patching": "memloc.localizers.activation_patching:ActivationPatching",
        "attention-bypass": "memloc.localizers.attention_bypass:AttentionBypass",
        "attribution-patching": "memloc.localizers.attribution_patching:AttributionPatching",
        "causal-trace": "memloc.localizers.causal_trace:CausalTrace",
        "curvature": "memloc.localizers.curvature:Curvature",
        "ffn-memory": "memloc.localizers.ffn_memory:FfnMemory",
        "grad-activation": "memloc.localizers.grad_activation:GradActivation",
        "hard-concrete": "memloc.localizers.hard_concrete:HardConcrete",
        "integrated-gradients": "memloc.localizers.integrated_gradients:IntegratedGradients",
        "knowledge-neurons": "memloc.localizers.knowledge_neurons:KnowledgeNeurons",
        "layer-retrain": "memloc.localizers.layer_retrain:LayerRetrain",
        "layer-rewind": "memloc.localizers.layer_rewind:LayerRewind",
        "logit-lens": "memloc.localizers.logit_lens:LogitLens",
        "outlier-set": "memloc.localizers.outlier_set:OutlierSet",
        "participation-ratio": "memloc.localizers.participation_ratio:ParticipationRatio",
        "prefix-perturbation": "memloc.localizers.prefix_perturbation:PrefixPerturbation",
        "random": "memloc.localizers.random:Random",
        "rare-token-heads": "memloc.localizers.rare_token_heads:RareTokenHeads",
        "slimming": "memloc.localizers.slimming:Slimming",
        "weight-gradient": "memloc.localizers.weight_gradient:WeightGradient",
        "zero-out": "memloc.localizers.zero_out:ZeroOut",
    },
)

MEASURES = Registry(
    "measure",
    {
        "counterfact": "memloc.measures.counterfact:CounterFact",
        "extraction": "memloc.measures.extraction:Extraction",
        "facts": "memloc.measures.facts:FactRecall",
        "knowedit": "memloc.measures.knowedit:KnowEdit",
        "mquake": "memloc.measures.mquake:Mquake",
        "perplexity": "memloc.measures.perplexity:Perplexity",
        "ripple-effects": "memloc.measures.ripple_effects:RippleEffects",
        "zsre": "memloc.measures.zsre:Zsre",
    },
)
