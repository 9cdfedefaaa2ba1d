"""Random models of every family, small enough to be run by the hundred, with weights large enough to have opinions."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from memloc.passages import Passage, Passages
from memloc.view import ModelView

VOCAB = 37


def _llama_shape(kind: Any, **more: Any) -> Any:
    return kind(vocab_size=VOCAB, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=5,
                num_key_value_heads=1, max_position_embeddings=48, **more)  # fmt: skip


CONFIGS = {
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=20, n_layer=2, n_head=5, n_positions=48),
    "gpt-neo": lambda: GPTNeoConfig(vocab_size=VOCAB, hidden_size=20, num_layers=2, num_heads=5,
                                    attention_types=[[["global", "local"], 1]], window_size=7, intermediate_size=28,
                                    max_position_embeddings=48),
    "gpt-neox": lambda: GPTNeoXConfig(vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, num_attention_heads=5,
                                      intermediate_size=28, max_position_embeddings=48),
    "llama": lambda: _llama_shape(LlamaConfig),
    "mistral": lambda: _llama_shape(MistralConfig, sliding_window=6),
    "qwen3": lambda: _llama_shape(Qwen3Config, head_dim=6),
}  # fmt: skip


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 6.0, **more: Any) -> Any:
    """A random model; `spread` multiplies its unembedding, so that some tokens are much likelier than others."""
    config = CONFIGS[family]()
    config.update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False})
    config.update(more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=(spread if "lm_head" in name or "embed_out" in name else 1.5) / 4)
    return model.eval()


def view_of(family: str, **more: Any) -> ModelView:
    return ModelView.open(tiny(family, **more))


def greedy(model: Any, prefix: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """What transformers' own generate says, one row at a time: no padding, no shared batch."""
    ids = torch.tensor([prefix])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tuple(said[0, len(prefix) :].tolist())


def mixed_passages(model: Any, *, count: int = 14, seed: int = 0, vocab: int = VOCAB) -> Passages:
    """Rows of many lengths: a third recited by the model, a third off by one token, a third random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    items = []
    for index in range(count):
        prefix = tuple(draw(0, vocab) for _ in range(draw(1, 12)))
        suffix = list(greedy(model, prefix, draw(1, 15)))
        if index % 3 == 1:
            place = draw(0, len(suffix))
            suffix[place] = (suffix[place] + 1 + draw(0, vocab - 1)) % vocab
        if index % 3 == 2:
            suffix = [draw(0, vocab) for _ in suffix]
        items.append(Passage(f"row-{index}", prefix, tuple(suffix), {"dose": index % 3}))
    return Passages(tuple(items), "mixed")


@cache
def case(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Passages]:
    """A model and mixed passages for it, shared by tests that only look."""
    model = tiny(family, dtype=dtype)
    return model, mixed_passages(model)
