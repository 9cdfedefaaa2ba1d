"""Small random models of odd sizes, and random deltas for them, shared by the tests of edits and checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from editors.deltas import Delta, Dense, LowRank, Sparse
from memloc.sites import Kind, Site
from memloc.view import ModelView

FORMS = ("low-rank", "sparse", "dense")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OUT = Site(1, Kind.MLP_OUT)


def build(family: str = "gpt2", dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 0):
    """A two-layer model whose sizes are all different."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(seed)
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=2, n_embd=15, n_head=3, n_inner=22, vocab_size=37, n_positions=16, tie_word_embeddings=tied
            )
        )
    elif family == "neox":
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                num_hidden_layers=2, hidden_size=12, num_attention_heads=3, intermediate_size=22, vocab_size=37,
                max_position_embeddings=16, tie_word_embeddings=tied,
            )
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=2, hidden_size=12, num_attention_heads=3, num_key_value_heads=1, intermediate_size=22,
                vocab_size=37, max_position_embeddings=16, tie_word_embeddings=tied,
            )
        )  # fmt: skip
    return model.to(dtype).eval()


def look(model) -> ModelView:
    return ModelView.open(model, prove=False)


def delta_for(shape: tuple[int, ...], form: str, *, seed: int = 0, scale: float = 0.05) -> Delta:
    """A random delta of one form; sparse ones touch about a third."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(shape, generator=generator)
    if form == "sparse":
        return Sparse.of(values, torch.rand(shape, generator=generator) < 0.3)
    if form == "dense" or len(shape) == 1:
        return Dense(values)
    return LowRank(values[:, :2], torch.randn(2, shape[1], generator=generator))


def deltas_for(
    view: ModelView, *sites: Site, form: str = "low-rank", seed: int = 0, scale: float = 0.05
) -> dict[Site, Delta]:
    return {
        site: delta_for(tuple(view.weight(site).shape), form, seed=seed + number, scale=scale)
        for number, site in enumerate(sites)
    }


def bits(model) -> dict[str, bytes]:
    """Every parameter, byte by byte."""
    flat = {name: parameter.detach().contiguous().view(-1) for name, parameter in model.named_parameters()}
    return {name: parameter.view(torch.uint8).numpy().tobytes() for name, parameter in flat.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
