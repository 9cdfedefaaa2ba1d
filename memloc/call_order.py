"""A row for a model whose family has none: read off the order in which one forward pass calls its modules.

What is read is a guess, and several may fit (which of two maps is the gate, how a shared matrix is laid out). Guesses
are handed on, the likeliest first; whoever opens the model takes the first that the arithmetic of `memloc.proof` bears
out. A name is asked for one thing only: attention's maps are those below a module with "att" in its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from memloc import hooks
from memloc.architectures import Fused, Row
from memloc.errors import ModelError
from memloc.sites import Kind

HEARD = tuple[str, Tensor, Tensor]
"""Name of a module, what entered it and what it put out."""


@dataclass(frozen=True)
class Hints:
    """What is known beforehand: module paths, or None where they are to be found.

    Attributes:
        blocks: of the list of blocks.
        attention: of the attention module, inside a block.
        down: of `mlp.out`, inside a block.
        final_norm: of the norm before the unembedding.
        unembed: of the unembedding.
    """

    blocks: str | None = None
    attention: str | None = None
    down: str | None = None
    final_norm: str | None = None
    unembed: str | None = None


def rows_by_call_order(model: Any, hints: Hints | None = None) -> Iterator[Row]:
    """Rows that may describe `model`, the likeliest first; each is a guess until it is proved.

    Args:
        model: a transformers causal language model in evaluation mode.
        hints: paths that are known.

    Raises:
        ModelError: its calls are not those of a decoder of equal blocks; the message says what is missing.

    Cost: one forward of two short rows.
    """
    calls = _Calls.of(model, hints or Hints())
    yield from calls.rows()


@dataclass(frozen=True)
class _Calls:
    """What one forward pass called.

    Attributes:
        model: the model.
        hints: what is known.
        blocks: path of the list of blocks.
        inside: calls in one block, in order, by path inside it; the list's second block where there are two.
        outside: calls of modules without children outside the blocks, after the last block.
    """

    model: Any
    hints: Hints
    blocks: str
    inside: tuple[HEARD, ...]
    outside: tuple[HEARD, ...]

    @classmethod
    def of(cls, model: Any, hints: Hints) -> _Calls:
        modules: dict[str, nn.Module] = dict(model.named_modules())
        blocks = hints.blocks or _block_list(model, modules)
        count = len(list(modules[blocks].children())) if blocks in modules else 0
        if not count:
            raise ModelError(f"{blocks}: no list of blocks; name it by layer_module_tmp")
        leaves = {name: module for name, module in modules.items() if not any(True for _ in module.children())}
        seen = _run(model, leaves)
        own, last = f"{blocks}.{min(1, count - 1)}.", f"{blocks}.{count - 1}."
        inside = tuple((name.removeprefix(own), *rest) for name, *rest in seen if name.startswith(own))
        ends = [index for index, (name, *_) in enumerate(seen) if name.startswith(last)]
        if not inside or not ends:
            raise ModelError(f"{blocks}: its blocks call no modules of their own, so nothing can be read in them")
        return cls(model, hints, blocks, inside, tuple(seen[ends[-1] + 1 :]))  # type: ignore[arg-type]

    def rows(self) -> Iterator[Row]:
        """Guesses."""
        width = int(self.model.config.hidden_size)
        maps = [heard for heard in self.inside if _is_map(self._leaf(heard[0]), heard)]
        attention = [heard for heard in maps if self._in_attention(heard[0])]
        others = [heard for heard in maps if not self._in_attention(heard[0])]
        out = [heard for heard in attention if heard[2].shape[-1] == width]
        down = [h for h in others if h[2].shape[-1] == width and self.hints.down in (None, h[0])]
        if not out or not down:
            what = "attention" if not out else "the MLP"
            raise ModelError(f"{self.blocks}: no linear map of {what} puts out the stream's {width} numbers")
        for read in _attention_maps([heard for heard in attention if heard[0] != out[-1][0]]):
            for entrance in _mlp_maps([heard for heard in others if heard[0] != down[-1][0]], down[-1][1].shape[-1]):
                yield from self._guesses(out[-1], down[-1], read, entrance)

    def _guesses(self, out: HEARD, down: HEARD, read: _Maps, entrance: _Maps) -> Iterator[Row]:
        maps = {**read.apart, **entrance.apart, Kind.ATTN_OUT: out[0], Kind.MLP_OUT: down[0]}
        added = {kind: path for kind, path in ((Kind.ATTN_OUT, self._after(out)), (Kind.MLP_OUT, self._after(down)))}
        norms = {kind: self._before(heard) for kind, heard in (read.heard | entrance.heard).items()}
        one = Row(
            family=f"{getattr(self.model.config, 'model_type', type(self.model).__name__)}, by call order",
            model_types=(),
            blocks=self.blocks,
            maps=maps,
            fused=(*read.fused, *entrance.fused),
            final_norm=self.hints.final_norm or self._final_norm(),
            embed=self._name_of(self.model.get_input_embeddings()),
            unembed=self.hints.unembed or self._name_of(self.model.get_output_embeddings()),
            stored_in_out=_in_out(self._leaf(down[0]), down),
            norms={kind: path for kind, path in norms.items() if path is not None},
            added={kind: path for kind, path in added.items() if path is not None},
            overwrites=True,
            found=True,
        )
        yield one
        yield replace(one, norm_offset=1.0)
        if one.added:
            yield replace(one, added={})
            yield replace(one, added={}, norm_offset=1.0)
        yield replace(one, norms={})

    def _in_attention(self, path: str) -> bool:
        if self.hints.attention is not None:
            return path.startswith(self.hints.attention + ".")
        return "att" in path.lower()

    def _leaf(self, path: str) -> nn.Module:
        count = len(list(self.model.get_submodule(self.blocks).children()))
        found: nn.Module = self.model.get_submodule(f"{self.blocks}.{min(1, count - 1)}.{path}")
        return found

    def _before(self, heard: HEARD) -> str | None:
        """The norm whose output the map reads."""
        for name, _, leaving in self.inside:
            if name != heard[0] and _is_norm(self._leaf(name)) and _equal(leaving, heard[1]):
                return name
        return None

    def _after(self, heard: HEARD) -> str | None:
        """The norm that reads what the map puts out, and nothing else."""
        for name, entering, _ in self.inside:
            if _is_norm(self._leaf(name)) and _equal(entering, heard[2]):
                return name
        return None

    def _final_norm(self) -> str:
        wanted = self.hints.unembed or self._name_of(self.model.get_output_embeddings())
        names = [name for name, _, _ in self.outside if name != wanted and _is_norm(self.model.get_submodule(name))]
        if not names:
            raise ModelError("no norm is called between the last block and the unembedding; name it by ln_f_module")
        return names[-1]

    def _name_of(self, module: nn.Module | None) -> str:
        for name, other in self.model.named_modules():
            if other is module:
                return str(name)
        raise ModelError("the model names no embedding, or no unembedding, of its own; is it a language model?")


@dataclass(frozen=True)
class _Maps:
    """What is guessed of a sublayer's maps: those with a module of their own, shared matrices, and what each heard."""

    apart: Mapping[Kind, str]
    fused: tuple[Fused, ...]
    heard: dict[Kind, HEARD]


QKV = (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V)


def _attention_maps(found: list[HEARD]) -> Iterator[_Maps]:
    if len(found) == 1:
        for layout in ("per-head", "qkv"):
            yield _Maps({}, (Fused(found[0][0], layout),), dict.fromkeys(QKV, found[0]))
        return
    if len(found) != 3:
        names = ", ".join(name for name, _, _ in found) or "none"
        raise ModelError(f"attention reads the stream through {len(found)} maps ({names}), not through 3, or 1 for all")
    # Queries, keys and values by their names where these say so, else in the order of the calls; the values are proved.
    by_letter = sorted(found, key=lambda heard: next((at for at, letter in enumerate("qkv")
                       if heard[0].rpartition(".")[2].lower().startswith(letter)), 3))  # fmt: skip
    for order in (by_letter, found):
        heard = dict(zip(QKV, order, strict=True))
        yield _Maps({kind: entry[0] for kind, entry in heard.items()}, (), heard)


def _mlp_maps(found: list[HEARD], neurons: int) -> Iterator[_Maps]:
    single = [heard for heard in found if heard[2].shape[-1] == neurons]
    double = [heard for heard in found if heard[2].shape[-1] == 2 * neurons]
    if len(single) == 1:
        yield _Maps({Kind.MLP_IN: single[0][0]}, (), {Kind.MLP_IN: single[0]})
    elif len(single) == 2:
        for gate, into in (single, single[::-1]):
            yield _Maps({Kind.MLP_GATE: gate[0], Kind.MLP_IN: into[0]}, (), {Kind.MLP_GATE: gate, Kind.MLP_IN: into})
    elif len(double) == 1:
        both = {Kind.MLP_GATE: double[0], Kind.MLP_IN: double[0]}
        yield _Maps({}, (Fused(double[0][0], "gate-in"),), both)
    else:
        names = ", ".join(name for name, _, _ in found) or "none"
        raise ModelError(f"{neurons} neurons a block, and the maps outside attention are {names}: experts, or a kind "
                         "of MLP that is not known here")  # fmt: skip


def _block_list(model: Any, modules: Mapping[str, nn.Module]) -> str:
    wanted = getattr(model.config, "num_hidden_layers", None)
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList) and len(module) == wanted and len({type(entry) for entry in module}) == 1:
            return name
    raise ModelError(f"no list of {wanted} blocks of one class; name it by layer_module_tmp")


@torch.no_grad()
def _run(model: Any, leaves: Mapping[str, nn.Module]) -> list[HEARD]:
    ids = torch.randint(int(model.config.vocab_size), (2, 5), generator=torch.Generator().manual_seed(0))
    device = model.get_input_embeddings().weight.device
    try:
        with hooks.record_order(leaves) as seen:
            model(input_ids=ids.to(device), use_cache=False)
    except (RuntimeError, ValueError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"one forward pass of two short rows fails ({why})") from error
    return seen


def _is_map(module: nn.Module, heard: HEARD) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and heard[1].is_floating_point()


def _is_norm(module: nn.Module) -> bool:
    """A module of vectors, not of matrices, that is no mere function: scale what is put in and the same comes out."""
    if any(parameter.dim() != 1 for parameter in module.parameters()):
        return False
    weight = next(module.parameters(), None)
    shape = getattr(module, "normalized_shape", None)
    width = int(weight.shape[0]) if weight is not None else int(shape[-1]) if shape else 0
    if not width:
        return False
    with torch.no_grad():
        probe = torch.linspace(-1, 2, width).square()[None]
        if weight is not None:
            probe = probe.to(weight)
        one, two = module(64 * probe), module(512 * probe)
    return bool((one - two).abs().max() < 0.05 * one.abs().max())


def _in_out(module: nn.Module, heard: HEARD) -> bool:
    weight = module.get_parameter("weight")
    if weight.shape[0] != weight.shape[1]:
        return weight.shape[0] == heard[1].shape[-1]
    bias = getattr(module, "bias", None)
    made = heard[1] @ weight + (0 if bias is None else bias)
    return bool((made - heard[2]).abs().max() < 1e-2 * heard[2].abs().max())


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))
