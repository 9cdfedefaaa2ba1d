"""Tiny random models, one per model type of the table: odd, unequal sizes, so that no transposition can hide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers

from memloc.passages import Passage, Passages

VOCAB = 53
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, **_ENDS,
}  # fmt: skip
_FALCON = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_hidden_size": 37,
    "max_position_embeddings": 64, **_ENDS,
}  # fmt: skip

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 24, "n_inner": 37, "n_layer": 3, "n_head": 3, **_ENDS},
    ),
    "gpt_neo": (
        transformers.GPTNeoConfig,
        {
            "vocab_size": VOCAB, "max_position_embeddings": 64, "hidden_size": 20, "intermediate_size": 37,
            "num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 5, "window_size": 5, **_ENDS,
        },
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig,
        {
            "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
            "num_attention_heads": 3, "max_position_embeddings": 64, **_ENDS,
        },
    ),
    "llama": (transformers.LlamaConfig, _LLAMA),
    "mistral": (transformers.MistralConfig, {**_LLAMA, "sliding_window": 5}),
    "qwen2": (transformers.Qwen2Config, _LLAMA),
    "qwen3": (transformers.Qwen3Config, {**_LLAMA, "head_dim": 10}),
    "gptj": (
        transformers.GPTJConfig,
        {
            "vocab_size": VOCAB, "n_positions": 64, "n_embd": 24, "n_inner": 37, "n_layer": 3, "n_head": 3,
            "rotary_dim": 4, **_ENDS,
        },
    ),
    "opt": (
        transformers.OPTConfig,
        {
            "vocab_size": VOCAB, "hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 37, "num_hidden_layers": 3,
            "num_attention_heads": 3, "max_position_embeddings": 64, "pad_token_id": 1, **_ENDS,
        },
    ),
    "phi": (
        transformers.PhiConfig,
        {
            "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
            "num_attention_heads": 3, "max_position_embeddings": 64, **_ENDS,
        },
    ),
    "phi3": (
        transformers.Phi3Config,
        {**_LLAMA, "original_max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "olmo": (transformers.OlmoConfig, {**_LLAMA, "pad_token_id": 0}),
    "olmo2": (transformers.Olmo2Config, {**_LLAMA, "pad_token_id": 0}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            **_LLAMA, "head_dim": 10, "pad_token_id": 0, "sliding_window": 5, "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**_LLAMA, "head_dim": 10, "pad_token_id": 0, "sliding_window": 5, "sliding_window_pattern": 2},
    ),
    "falcon": (transformers.FalconConfig, _FALCON),
    "falcon_new": (transformers.FalconConfig, {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_rw": (
        transformers.FalconConfig,
        {**_FALCON, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    ),
    "bloom": (
        transformers.BloomConfig,
        {"vocab_size": VOCAB, "hidden_size": 24, "n_layer": 3, "n_head": 3, **_ENDS},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {**_LLAMA, "intermediate_size": 13, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            **_LLAMA, "head_dim": 10, "intermediate_size": 65, "moe_intermediate_size": 13, "num_experts": 5,
            "num_experts_per_tok": 2, "norm_topk_prob": False, "mlp_only_layers": [1],
        },
    ),
    "olmoe": (
        transformers.OlmoeConfig,
        {**_LLAMA, "intermediate_size": 13, "num_experts": 5, "num_experts_per_tok": 2, "pad_token_id": 0},
    ),
}  # fmt: skip
"""Model type to config class and settings. Grouped queries, a sliding window (Mistral) and local attention (GPT-Neo)
narrower than the passages, a head width that is not width / heads (Qwen3, Gemma), soft caps that bite (Gemma-2); among
the mixtures of experts one with a dense block between, of as many neurons as the experts have together (Qwen3-MoE)."""

MASKED: dict[str, tuple[type, dict[str, Any]]] = {
    "bert": (
        transformers.BertConfig,
        {
            "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
            "num_attention_heads": 3, "max_position_embeddings": 64, "mask_token_id": 3, "pad_token_id": 1,
            "layer_norm_eps": 1e-6,
        },
    ),
}  # fmt: skip
"""Masked language models, which read both ways: token 3 is their mask. Not among the families of the causal tests."""

FAMILIES = ("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Those that every test runs on."""
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
"""Mixtures of experts."""
UNUSUAL = ("gemma2", "falcon_new", "opt", *MIXTURES[:2])
"""Held to the whole battery for their traits: norms behind what is written, soft caps and scaled embeddings; parallel
blocks of two norms with grouped heads in one matrix; maps that are handed their tokens flat; mixtures of experts."""
OTHERS = tuple(family for family in CONFIGS if family not in FAMILIES + UNUSUAL)
"""Held to less: every method once."""


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode; weights eight times their usual size, so that it has opinions, and no
    parameter left at 0 or 1; the global generator is as it was before."""
    cls, settings = {**CONFIGS, **MASKED}[family]
    auto = transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(cls(**{**settings, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(8)
    if "num_experts_per_tok" in settings:
        # The default, a grouped product, takes neither odd sizes nor float64.
        model.set_experts_implementation("eager")
    return model.eval().to(dtype)


def cloze(count: int = 4, *, seed: int = 1, behind: int = 3) -> Passages:
    """Random passages with tokens behind the suffix, of unequal numbers: 0 of the first's."""
    generator = torch.Generator().manual_seed(100 + seed)
    items = [
        replace(item, after=tuple(torch.randint(VOCAB, (index % (behind + 1),), generator=generator).tolist()))
        for index, item in enumerate(passages(count, suffix=2, seed=seed))
    ]
    return Passages(tuple(items), "cloze")


def passages(count: int = 4, *, prefix: int = 9, suffix: int = 4, seed: int = 1, ragged: bool = True) -> Passages:
    """Random passages; `ragged`: of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        left = prefix + (2 * index if ragged else 0)
        right = suffix + (index % 3 if ragged else 0)
        ids = torch.randint(VOCAB, (left + right,), generator=generator).tolist()
        items.append(Passage(f"p{index}", tuple(ids[:left]), tuple(ids[left:])))
    return Passages(tuple(items), "random")
