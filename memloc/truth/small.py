"""Small untrained models of any family of the table, for worlds that train their own."""

from __future__ import annotations

from typing import Any

import torch

from memloc.view import ModelView


def small(
    family: str = "gpt2",
    *,
    vocab: int,
    context: int,
    layers: int = 2,
    width: int = 48,
    heads: int = 4,
    neurons: int = 192,
    seed: int = 0,
) -> ModelView:
    """A freshly initialised causal language model with no dropout; torch's own generator is left as it was.

    Args:
        family: a model type, such as "gpt2" or "llama".
        vocab: tokens.
        context: longest row.
        layers: blocks.
        width: d.
        heads: query heads, and as many key-value heads.
        neurons: f, a layer.
        seed: of the initialisation.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocab, "max_position_embeddings": context, "num_hidden_layers": layers, "hidden_size": width,
        "num_attention_heads": heads, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    sizes |= {"n_inner": neurons} if family == "gpt2" else {"intermediate_size": neurons}
    if family == "gpt_neo":
        sizes["attention_types"] = [[["global"], layers]]
    elif family not in ("gpt2", "gpt_neox"):
        sizes |= {"num_key_value_heads": heads, "head_dim": width // heads}
    config = AutoConfig.for_model(family, **sizes)
    for name in config.to_dict():
        if name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return ModelView.open(model)
