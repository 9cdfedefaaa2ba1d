"""One row per model family: where its linear maps are, how they are stored, what is fused.

A row is a claim; `ModelView` proves it by arithmetic on load. To support a family, add a row to `ROWS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memloc import offloading
from memloc.errors import ModelError
from memloc.sites import Kind

QKV = (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V)
GATED = (Kind.MLP_GATE, Kind.MLP_IN)


@dataclass(frozen=True)
class Fused:
    """Several maps in one matrix.

    Attributes:
        path: module path inside the block.
        layout: "qkv": all queries, then all keys, then all values. "per-head": for every key-value head the queries it
            serves, then its key, then its value; so too where all heads share one. "gate-in": the gate, then `mlp.in`.
    """

    path: str
    layout: str

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What it holds."""
        return GATED if self.layout == "gate-in" else QKV

    def rows(self, kind: Kind, shape: Shape) -> slice | tuple[int, ...]:
        """Which output rows belong to `kind` (a slice where they are contiguous)."""
        part = self.kinds.index(kind)
        if self.layout == "per-head" and shape.kv_heads > 1:
            served = shape.heads // shape.kv_heads
            table = torch.arange((shape.heads + 2 * shape.kv_heads) * shape.head_width)
            groups = table.view(shape.kv_heads, served + 2, shape.head_width)
            cut = slice(0, served) if part == 0 else slice(served + part - 1, served + part)
            return tuple(groups[:, cut].reshape(-1).tolist())
        sizes = [shape.neurons] * 2
        if self.layout != "gate-in":
            sizes = [heads * shape.head_width for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        return slice(sum(sizes[:part]), sum(sizes[: part + 1]))


@dataclass(frozen=True)
class Shape:
    """How much of everything a block has: read off its weights, not off its configuration."""

    heads: int
    kv_heads: int
    head_width: int
    neurons: int


@dataclass(frozen=True)
class Experts:
    """Where a mixture of experts keeps its maps, in those blocks that are one.

    Attributes:
        path: module path, inside a block, of all experts together.
        router: module path of the map whose outputs choose among them.
        into: the experts' parameter [experts, 2 · neurons, width]: of each, the rows of its gate, then of `mlp.in`.
        out: the experts' parameter [experts, width, neurons].
    """

    path: str = "mlp.experts"
    router: str = "mlp.gate"
    into: str = "gate_up_proj"
    out: str = "down_proj"

    def parameter(self, kind: Kind) -> str:
        """The parameter, inside the module, that holds `kind`."""
        return self.out if kind is Kind.MLP_OUT else self.into


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
        fused: maps that share a matrix; the others stand in `maps`.
        stored_in_out: linear maps of the blocks are stored [in, out] (GPT-2's Conv1D), not [out, in].
        norms: kind to path, inside a block, of the norm whose output that map reads; nothing where maps read the
            stream itself, as in blocks that norm what they write.
        norm_offset: what a norm's stored weight lacks to its gain (1 where it is stored as the gain less 1).
        added: kind (`attn.out`, `mlp.out`) to path, inside a block, of the norm its output passes before it is added
            to the stream; nothing where it is added as it is.
        summed: kind (`attn.out`, `mlp.out`) to path, inside a block, of the norm that the sum of the stream and the
            map's output passes to become the stream (post-LN); nothing where the sum is the stream.
        inner: kind (`attn.q`, `attn.k`) to path, inside a block, of the norm its output passes, where models have one.
        position: path of the embedding of positions, where they have one.
        embed_norm: path of the norm behind the token embedding, where they have one.
        when: settings of the configuration that this row asks for, where one model type has several layouts; the first
            row that fits is taken.
        experts: where the maps of the experts are, in families with such blocks; `maps` then tells where dense blocks
            have theirs, if there are any.
        causal: a token hears those before it only, and the model says what comes next. Otherwise tokens hear both ways,
            and the model says what stands where a mask token is (a masked language model).
        transform: `final_norm` is no norm but a whole map, function and norm, which the model runs behind its base.
        attention: path, inside a block, of the module that does all of attention; by default the one around `attn.out`.
        overwrites: blocks add in place, onto what one of their maps put out.
        found: the row was not in the table but found in the model's calls.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    maps: Mapping[Kind, str]
    final_norm: str
    embed: str
    unembed: str = "lm_head"
    fused: tuple[Fused, ...] = ()
    stored_in_out: bool = False
    norms: Mapping[Kind, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    added: Mapping[Kind, str] = field(default_factory=dict)
    summed: Mapping[Kind, str] = field(default_factory=dict)
    inner: Mapping[Kind, str] = field(default_factory=dict)
    position: str | None = None
    embed_norm: str | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    experts: Experts | None = None
    causal: bool = True
    transform: bool = False
    attention: str | None = None
    overwrites: bool = False
    found: bool = False

    def path(self, kind: Kind) -> str | None:
        """Module path of `kind` inside a block, or None where the family has none."""
        shared = self.shared(kind)
        return self.maps.get(kind) if shared is None else shared.path

    def beside(self, kind: Kind) -> str | None:
        """Module path of a `kind` that is no map, inside a block or whole; None where the family has none.

        The norm of a parallel block, which attention and the MLP both read, is attention's.
        """
        first, second = self.norms.get(Kind.ATTN_Q), self.norms.get(Kind.MLP_IN)
        return {
            Kind.ATTN_NORM: first,
            Kind.MLP_NORM: None if second == first else second,
            Kind.ATTN_QNORM: self.inner.get(Kind.ATTN_Q),
            Kind.ATTN_KNORM: self.inner.get(Kind.ATTN_K),
            Kind.ATTN_OUTNORM: self.added.get(Kind.ATTN_OUT, self.summed.get(Kind.ATTN_OUT)),
            Kind.MLP_OUTNORM: self.added.get(Kind.MLP_OUT, self.summed.get(Kind.MLP_OUT)),
            Kind.NORM: self.final_norm,
            Kind.EMBED_NORM: self.embed_norm,
            Kind.POSITION: self.position,
        }.get(kind)

    def shared(self, kind: Kind) -> Fused | None:
        """The matrix that `kind` shares with others, if it does."""
        return next((fused for fused in self.fused if kind in fused.kinds), None)

    def serves(self, config: Any) -> bool:
        """Whether the row is for models of this configuration."""
        same = (getattr(config, key, None) == value for key, value in self.when.items())
        return getattr(config, "model_type", None) in self.model_types and all(same)

    @torch.no_grad()
    def bare_norm(self, norm: nn.Module, stream: Tensor) -> Tensor:
        """What `norm` makes of `stream` with its gain 1 and its bias 0, in the stream's dtype."""
        norm = offloading.unhooked(norm)
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
        expert: which of the matrices of a parameter [experts, out, in] is meant.
        joined: all of them, side by side: "rows" as [experts · out, in], "columns" as [out, experts · in].
    """

    parameter: str
    transposed: bool = False
    rows: slice | tuple[int, ...] | None = None
    expert: int | None = None
    joined: str = ""

    @property
    def unit(self) -> str:
        """Name of the stored matrix: the parameter's, with the expert's number where the parameter holds several."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    @property
    def shown(self) -> slice | tuple[int, ...] | None:
        """Which columns of what `record` shows as the site's output are its own: a fused matrix is shown whole."""
        return None if self.joined or self.expert is not None else self.rows

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored matrix the weight lies in: the parameter itself, or one expert's part of it."""
        return stored if self.expert is None else stored[self.expert]

    def read(self, stored: Tensor) -> Tensor:
        """The weight inside `stored`, [out, in]: a view on its memory, but a copy where it is not in one piece."""
        if self.joined:
            part = stored if self.rows is None else stored[:, self.rows]
            return part.flatten(0, 1) if self.joined == "rows" else part.transpose(0, 1).flatten(1)
        stored = self.matrix(stored)
        whole = stored.T if self.transposed else stored
        if self.rows is None:
            return whole
        return whole[self.rows] if isinstance(self.rows, slice) else whole[list(self.rows)]

    def write(self, stored: Tensor, weight: Tensor) -> None:
        """Put `weight` [out, in] where it belongs in `stored`, in place. Only editors call this."""
        if self.joined:
            part = stored if self.rows is None else stored[:, self.rows]
            columns = self.joined == "columns"
            by_expert = (
                weight.view(len(weight), len(stored), -1).transpose(0, 1) if columns else weight.view(part.shape)
            )
            part.copy_(by_expert)
            return
        stored = self.matrix(stored)
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
        found = {"parameter": self.parameter, "transposed": self.transposed, "rows": rows}
        found |= {} if self.expert is None else {"expert": self.expert}
        return found | ({"joined": self.joined} if self.joined else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Place:
        """Back from `to_json`."""
        rows = value["rows"]
        if isinstance(rows, Mapping):
            rows = slice(rows["from"], rows["to"])
        elif rows is not None:
            rows = tuple(rows)
        return cls(value["parameter"], value["transposed"], rows, value.get("expert"), value.get("joined", ""))


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


_LLAMA_MLP = {Kind.MLP_GATE: "mlp.gate_proj", Kind.MLP_IN: "mlp.up_proj", Kind.MLP_OUT: "mlp.down_proj"}
_SANDWICH = {Kind.ATTN_OUT: "post_attention_layernorm", Kind.MLP_OUT: "post_feedforward_layernorm"}
_INNER = {Kind.ATTN_Q: "self_attn.q_norm", Kind.ATTN_K: "self_attn.k_norm"}
_FALCON: dict[str, Any] = {
    "model_types": ("falcon",),
    "blocks": "transformer.h",
    "maps": {
        Kind.ATTN_OUT: "self_attention.dense",
        Kind.MLP_IN: "mlp.dense_h_to_4h",
        Kind.MLP_OUT: "mlp.dense_4h_to_h",
    },
    "fused": (Fused("self_attention.query_key_value", "per-head"),),
    "final_norm": "transformer.ln_f",
    "embed": "transformer.word_embeddings",
    "overwrites": True,
}

ROWS: tuple[Row, ...] = (
    Row(
        family="GPT-2",
        model_types=("gpt2",),
        blocks="transformer.h",
        maps={Kind.ATTN_OUT: "attn.c_proj", Kind.MLP_IN: "mlp.c_fc", Kind.MLP_OUT: "mlp.c_proj"},
        fused=(Fused("attn.c_attn", "qkv"),),
        final_norm="transformer.ln_f",
        embed="transformer.wte",
        stored_in_out=True,
        position="transformer.wpe",
        norms=_normed("ln_1", "ln_2"),
    ),
    Row(
        family="GPT-Neo",
        model_types=("gpt_neo",),
        blocks="transformer.h",
        maps=_split("attn.attention", "out_proj", {Kind.MLP_IN: "mlp.c_fc", Kind.MLP_OUT: "mlp.c_proj"}),
        final_norm="transformer.ln_f",
        embed="transformer.wte",
        position="transformer.wpe",
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
        fused=(Fused("attention.query_key_value", "per-head"),),
        final_norm="gpt_neox.final_layer_norm",
        embed="gpt_neox.embed_in",
        norms=_normed("input_layernorm", "post_attention_layernorm"),
    ),
    Row(
        family="GPT-J",
        model_types=("gptj",),
        blocks="transformer.h",
        maps=_split("attn", "out_proj", {Kind.MLP_IN: "mlp.fc_in", Kind.MLP_OUT: "mlp.fc_out"}),
        final_norm="transformer.ln_f",
        embed="transformer.wte",
        norms=_normed("ln_1", "ln_1"),
    ),
    Row(
        family="OPT",
        model_types=("opt",),
        blocks="model.decoder.layers",
        maps=_split("self_attn", "out_proj", {Kind.MLP_IN: "fc1", Kind.MLP_OUT: "fc2"}),
        final_norm="model.decoder.final_layer_norm",
        embed="model.decoder.embed_tokens",
        position="model.decoder.embed_positions",
        norms=_normed("self_attn_layer_norm", "final_layer_norm"),
    ),
    Row(
        family="Phi",
        model_types=("phi",),
        blocks="model.layers",
        maps=_split("self_attn", "dense", {Kind.MLP_IN: "mlp.fc1", Kind.MLP_OUT: "mlp.fc2"}),
        final_norm="model.final_layernorm",
        embed="model.embed_tokens",
        norms=_normed("input_layernorm", "input_layernorm"),
    ),
    Row(
        family="Phi-3",
        model_types=("phi3",),
        blocks="model.layers",
        maps={Kind.ATTN_OUT: "self_attn.o_proj", Kind.MLP_OUT: "mlp.down_proj"},
        fused=(Fused("self_attn.qkv_proj", "qkv"), Fused("mlp.gate_up_proj", "gate-in")),
        final_norm="model.norm",
        embed="model.embed_tokens",
        norms=_normed("input_layernorm", "post_attention_layernorm"),
    ),
    Row(
        family="Llama",
        model_types=("llama", "mistral", "qwen2", "qwen3", "olmo"),
        blocks="model.layers",
        maps=_split("self_attn", "o_proj", _LLAMA_MLP),
        final_norm="model.norm",
        embed="model.embed_tokens",
        inner=_INNER,
        norms=_normed("input_layernorm", "post_attention_layernorm"),
    ),
    Row(
        family="Mixture of experts",
        model_types=("mixtral", "qwen3_moe", "olmoe"),
        blocks="model.layers",
        maps=_split("self_attn", "o_proj", _LLAMA_MLP),
        final_norm="model.norm",
        embed="model.embed_tokens",
        inner=_INNER,
        norms=_normed("input_layernorm", "post_attention_layernorm") | {Kind.MLP_ROUTER: "post_attention_layernorm"},
        experts=Experts(),
    ),
    Row(
        # Maps read the stream itself and norms stand behind them, so there is nothing to fold: no `norms`.
        family="OLMo-2",
        model_types=("olmo2",),
        blocks="model.layers",
        maps=_split("self_attn", "o_proj", _LLAMA_MLP),
        final_norm="model.norm",
        embed="model.embed_tokens",
        inner=_INNER,
        added=_SANDWICH,
    ),
    Row(
        family="Gemma",
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        maps=_split("self_attn", "o_proj", _LLAMA_MLP),
        final_norm="model.norm",
        embed="model.embed_tokens",
        norms=_normed("input_layernorm", "pre_feedforward_layernorm"),
        norm_offset=1.0,
        inner=_INNER,
        added=_SANDWICH,
    ),
    Row(
        family="Falcon, two norms",
        norms=_normed("ln_attn", "ln_mlp"),
        when={"num_ln_in_parallel_attn": 2},
        **_FALCON,
    ),
    Row(
        family="Falcon, sequential",
        norms=_normed("input_layernorm", "post_attention_layernorm"),
        when={"parallel_attn": False},
        **_FALCON,
    ),
    Row(family="Falcon", norms=_normed("input_layernorm", "input_layernorm"), **_FALCON),
    Row(
        family="BLOOM",
        model_types=("bloom",),
        blocks="transformer.h",
        maps={
            Kind.ATTN_OUT: "self_attention.dense",
            Kind.MLP_IN: "mlp.dense_h_to_4h",
            Kind.MLP_OUT: "mlp.dense_4h_to_h",
        },
        fused=(Fused("self_attention.query_key_value", "per-head"),),
        final_norm="transformer.ln_f",
        embed="transformer.word_embeddings",
        embed_norm="transformer.word_embeddings_layernorm",
        norms=_normed("input_layernorm", "post_attention_layernorm"),
    ),
    Row(
        # Norms stand behind the sums, so maps read the stream itself: no `norms`.
        family="BERT",
        model_types=("bert",),
        when={"is_decoder": False},
        blocks="bert.encoder.layer",
        maps={
            Kind.ATTN_Q: "attention.self.query",
            Kind.ATTN_K: "attention.self.key",
            Kind.ATTN_V: "attention.self.value",
            Kind.ATTN_OUT: "attention.output.dense",
            Kind.MLP_IN: "intermediate.dense",
            Kind.MLP_OUT: "output.dense",
        },
        summed={Kind.ATTN_OUT: "attention.output.LayerNorm", Kind.MLP_OUT: "output.LayerNorm"},
        final_norm="cls.predictions.transform",
        transform=True,
        unembed="cls.predictions.decoder",
        embed="bert.embeddings.word_embeddings",
        embed_norm="bert.embeddings.LayerNorm",
        position="bert.embeddings.position_embeddings",
        attention="attention",
        causal=False,
    ),
)
"""The table. Facts verified on tiny random models in tests/tiny."""


def row_in_table(config: Any) -> Row | None:
    """The row that serves models of this configuration, or None where the table has none."""
    return next((row for row in ROWS if row.serves(config)), None)


def row_for(config: Any) -> Row:
    """The row that serves models of this configuration.

    Raises:
        ModelError: no row does; the message names the file to edit.
    """
    found = row_in_table(config)
    if found is None:
        known = ", ".join(sorted({name for row in ROWS for name in row.model_types}))
        wanted = getattr(config, "model_type", None)
        raise ModelError(f"no row for the model type {wanted!r} (known: {known}); add one to memloc/architectures.py")
    return found
