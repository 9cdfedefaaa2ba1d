"""One row per model family: where its linear maps are, how they are stored, what is fused.

A row is a claim; `ModelView` proves it by arithmetic on load. To support a family, add a row to `ROWS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memloc.errors import ModelError
from memloc.sites import Kind


@dataclass(frozen=True)
class Fused:
    """Query, key and value in one matrix.

    Attributes:
        path: module path inside the block.
        layout: "qkv": all queries, then all keys, then all values. "per-head": for every head its query, key, value.
    """

    path: str
    layout: str

    def rows(self, kind: Kind, heads: int, kv_heads: int, head_width: int) -> slice | tuple[int, ...]:
        """Which output rows belong to `kind` (a slice where they are contiguous)."""
        part = (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V).index(kind)
        if self.layout == "qkv":
            sizes = [heads * head_width, kv_heads * head_width, kv_heads * head_width]
            return slice(sum(sizes[:part]), sum(sizes[: part + 1]))
        table = torch.arange(3 * heads * head_width).view(heads, 3, head_width)
        return tuple(table[:, part].reshape(-1).tolist())


@dataclass(frozen=True)
class Row:
    """How one family is laid out.

    Attributes:
        family: name for people.
        model_types: `config.model_type` values it serves.
        blocks: path of the list of blocks.
        maps: kind to module path inside a block.
        final_norm: path of the norm before the unembedding.
        embed: path of the token embedding.
        unembed: path of the unembedding.
        fused: query, key and value in one matrix, or None where `maps` holds them apart.
        stored_in_out: linear maps of the blocks are stored [in, out] (GPT-2's Conv1D), not [out, in].
        norms: kind to path, inside a block, of the norm whose output that map reads; nothing where maps read the
            stream itself, as in blocks that norm what they write.
        norm_offset: what a norm's stored weight lacks to its gain (1 where it is stored as the gain less 1).
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    maps: Mapping[Kind, str]
    final_norm: str
    embed: str
    unembed: str = "lm_head"
    fused: Fused | None = None
    stored_in_out: bool = False
    norms: Mapping[Kind, str] = field(default_factory=dict)
    norm_offset: float = 0.0

    def path(self, kind: Kind) -> str | None:
        """Module path of `kind` inside a block, or None where the family has none."""
        if self.fused is not None and kind in (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V):
            return self.fused.path
        return self.maps.get(kind)

    @torch.no_grad()
    def bare_norm(self, norm: nn.Module, stream: Tensor) -> Tensor:
        """What `norm` makes of `stream` with its gain 1 and its bias 0, in the stream's dtype."""
        plain = {
            name: stream.new_full(stored.shape, 1 - self.norm_offset if name == "weight" else 0)
            for name, stored in norm.named_parameters()
        }
        found: Tensor = torch.func.functional_call(norm, plain, (stream,))
        return found


@dataclass(frozen=True)
class Place:
    """Where a `[out, in]` weight, or an `[out]` bias, lies in a stored parameter.

    Attributes:
        parameter: the live model's name of the parameter.
        transposed: the parameter is stored [in, out].
        rows: which output rows of it are meant (a fused matrix holds several), or None for all.
    """

    parameter: str
    transposed: bool = False
    rows: slice | tuple[int, ...] | None = None

    def read(self, stored: Tensor) -> Tensor:
        """The weight inside `stored`, [out, in]: a view on its memory, but a copy where rows are not contiguous."""
        whole = stored.T if self.transposed else stored
        if self.rows is None:
            return whole
        return whole[self.rows] if isinstance(self.rows, slice) else whole[list(self.rows)]

    def write(self, stored: Tensor, weight: Tensor) -> None:
        """Put `weight` [out, in] where it belongs in `stored`, in place. Only editors call this."""
        whole = stored.T if self.transposed else stored
        if self.rows is None:
            whole.copy_(weight)
        else:
            whole[self.rows if isinstance(self.rows, slice) else list(self.rows)] = weight

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        rows: Any = self.rows
        if isinstance(rows, slice):
            rows = {"from": rows.start, "to": rows.stop}
        return {"parameter": self.parameter, "transposed": self.transposed, "rows": rows}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Place:
        """Back from `to_json`."""
        rows = value["rows"]
        if isinstance(rows, Mapping):
            rows = slice(rows["from"], rows["to"])
        elif rows is not None:
            rows = tuple(rows)
        return cls(value["parameter"], value["transposed"], rows)


def _split(attention: str, out: str, mlp: Mapping[Kind, str]) -> dict[Kind, str]:
    """Separate query, key and value maps named {q,k,v}_proj under `attention`."""
    return {
        Kind.ATTN_Q: f"{attention}.q_proj",
        Kind.ATTN_K: f"{attention}.k_proj",
        Kind.ATTN_V: f"{attention}.v_proj",
        Kind.ATTN_OUT: f"{attention}.{out}",
        **mlp,
    }


def _normed(attention: str, mlp: str) -> dict[Kind, str]:
    """The norms before attention and before the MLP, for every map that reads them."""
    first, second = (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V), (Kind.MLP_GATE, Kind.MLP_IN)
    return {kind: attention for kind in first} | {kind: mlp for kind in second}


ROWS: tuple[Row, ...] = (
    Row(
        family="GPT-2",
        model_types=("gpt2",),
        blocks="transformer.h",
        maps={Kind.ATTN_OUT: "attn.c_proj", Kind.MLP_IN: "mlp.c_fc", Kind.MLP_OUT: "mlp.c_proj"},
        fused=Fused("attn.c_attn", "qkv"),
        final_norm="transformer.ln_f",
        embed="transformer.wte",
        stored_in_out=True,
        norms=_normed("ln_1", "ln_2"),
    ),
    Row(
        family="GPT-Neo",
        model_types=("gpt_neo",),
        blocks="transformer.h",
        maps=_split("attn.attention", "out_proj", {Kind.MLP_IN: "mlp.c_fc", Kind.MLP_OUT: "mlp.c_proj"}),
        final_norm="transformer.ln_f",
        embed="transformer.wte",
        norms=_normed("ln_1", "ln_2"),
    ),
    Row(
        family="GPT-NeoX",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        maps={
            Kind.ATTN_OUT: "attention.dense",
            Kind.MLP_IN: "mlp.dense_h_to_4h",
            Kind.MLP_OUT: "mlp.dense_4h_to_h",
        },
        fused=Fused("attention.query_key_value", "per-head"),
        final_norm="gpt_neox.final_layer_norm",
        embed="gpt_neox.embed_in",
        norms=_normed("input_layernorm", "post_attention_layernorm"),
    ),
    Row(
        family="Llama",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        maps=_split(
            "self_attn",
            "o_proj",
            {Kind.MLP_GATE: "mlp.gate_proj", Kind.MLP_IN: "mlp.up_proj", Kind.MLP_OUT: "mlp.down_proj"},
        ),
        final_norm="model.norm",
        embed="model.embed_tokens",
        norms=_normed("input_layernorm", "post_attention_layernorm"),
    ),
)
"""The table. Facts verified on tiny random models in tests/tiny."""


def row_for(config: Any) -> Row:
    """The row that serves `config.model_type`.

    Raises:
        ModelError: no row does; the message names the file to edit.
    """
    wanted = getattr(config, "model_type", None)
    for row in ROWS:
        if wanted in row.model_types:
            return row
    known = ", ".join(sorted(name for row in ROWS for name in row.model_types))
    raise ModelError(f"no row for the model type {wanted!r} (known: {known}); add one to memloc/architectures.py")
