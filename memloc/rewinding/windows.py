"""Windows of a model's blocks put back to a checkpoint, one block's earlier tensors in memory at a time.

A window starts from the residual stream that one ordinary forward left below it; windows with equal start share the
blocks already rewound; only the blocks above are run again. Nothing is written: a block is called with other tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from memloc import hooks
from memloc.architectures import Place
from memloc.batches import Batch
from memloc.errors import CheckpointError, InputError, MismatchError
from memloc.passages import Passages
from memloc.provenance import digest_json, digest_tensor
from memloc.rewinding.snapshots import CONFIG, Snapshot
from memloc.sites import Kind, Site
from memloc.view import ModelView

VOLATILE = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "id2label",
    "label2id", "return_dict", "problem_type", "chunk_size_feed_forward", "initializer_range", "vocab_size",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "is_decoder", "classifier_dropout",
)  # fmt: skip
"""Entries of a configuration that do not change what a block computes."""


@dataclass(frozen=True)
class Rows:
    """Which rows [out] of a stored parameter are meant: `dim` is where they lie in it; all of them where None."""

    dim: int = 0
    index: Tensor | None = None

    @classmethod
    def of(cls, place: Place, live: Tensor) -> Rows:
        """Of a place in a stored parameter."""
        if place.rows is None:
            return cls()
        dim = 1 if place.transposed else 0
        every = torch.arange(live.shape[dim], device=live.device)
        return cls(dim, every[place.rows] if isinstance(place.rows, slice) else every[list(place.rows)])

    def put(self, onto: Tensor, part: Tensor) -> Tensor:
        """`onto` with these rows taken from `part`; a tensor of its own, or `part` where all rows are meant."""
        if self.index is None:
            return part
        return onto.index_copy(self.dim, self.index, part.index_select(self.dim, self.index))


@dataclass(frozen=True)
class Part:
    """What is rewound in one block: parameters by their name inside the block, and which rows of each."""

    layer: int
    rows: Mapping[str, tuple[Rows, ...]]

    def composed(self, view: ModelView, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Block parameters to call it with: `parts` in the rows that are meant, the model's own elsewhere."""
        block, found = view.block(self.layer), {}
        for name, rows in self.rows.items():
            live = block.get_parameter(name).detach()
            found[name] = live
            for entry in rows:
                found[name] = entry.put(found[name], parts[name].to(live))
        return found


def part(view: ModelView, layer: int, kinds: Sequence[Kind] | None) -> Part:
    """The whole block (its norms and biases too), or the weights and biases of the maps of some kinds.

    Raises:
        InputError: the block has no map of those kinds.
    """
    block = view.block(layer)
    if kinds is None:
        return Part(layer, {name: (Rows(),) for name, _ in block.named_parameters()})
    prefix, rows = f"{view.row.blocks}.{layer}.", dict[str, tuple[Rows, ...]]()
    for kind, bias in itertools.product(kinds, (False, True)):
        site = Site(layer, kind, bias)
        if kind.in_block and view.has(site):
            place = view.place(site)
            name = place.parameter.removeprefix(prefix)
            rows[name] = (*rows.get(name, ()), Rows.of(place, view.parameter(site)))
    if not rows:
        raise InputError(f"kinds {', '.join(map(str, kinds))}: {view.row.family} has none of them in its blocks")
    return Part(layer, rows)


def earlier_parts(view: ModelView, snapshot: Snapshot, part: Part) -> dict[str, Tensor]:
    """The snapshot's tensors of one block, as stored, read now.

    Raises:
        CheckpointError: one is missing, or not finite.
        MismatchError: a shape differs.
    """
    view.need_in_memory("putting layers back")
    found = {}
    for name in part.rows:
        full = f"{view.row.blocks}.{part.layer}.{name}"
        expected = view.block(part.layer).get_parameter(name)
        shape = snapshot.shape(full)
        if shape != tuple(expected.shape):
            raise MismatchError(
                f"{snapshot.folder}: {full} is {list(shape)}, the model's is {list(expected.shape)}; "
                "it is a checkpoint of another architecture"
            )
        found[name] = snapshot.tensor(full).to(expected.device)
        if not found[name].is_floating_point() or not bool(torch.isfinite(found[name].abs().max())):
            raise CheckpointError(f"{snapshot.folder}: {full} is quantised or holds values that are not finite")
    return found


def check_same_kind(view: ModelView, snapshot: Snapshot) -> None:
    """Refuse a checkpoint whose configuration or vocabulary says that it is of another architecture.

    Raises:
        MismatchError: names what differs, found and expected.
    """
    from transformers import AutoConfig

    if (snapshot.folder / CONFIG).is_file():
        try:
            theirs = AutoConfig.from_pretrained(str(snapshot.folder)).to_dict()
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{snapshot.folder / CONFIG} cannot be read: {error}") from error
        mine = view.config.to_dict()
        for key in ("model_type", *sorted(mine.keys() | theirs.keys())):
            counts = key not in VOLATILE and "drop" not in key and not key.startswith(("output_", "summary_"))
            if counts and mine.get(key) != theirs.get(key):
                raise MismatchError(
                    f"{snapshot.folder}: {key} is {theirs.get(key)!r}, the model's is {mine.get(key)!r}; "
                    "it is a checkpoint of another architecture"
                )
    _check_vocabulary(view, snapshot)


def _check_vocabulary(view: ModelView, snapshot: Snapshot) -> None:
    path = snapshot.folder / "tokenizer.json"
    if not path.is_file() or not hasattr(view.tokenizer, "get_vocab"):
        return
    from tokenizers import Tokenizer

    theirs, mine = Tokenizer.from_file(str(path)).get_vocab(), view.tokenizer.get_vocab()
    other = sorted(word for word, token in theirs.items() if mine.get(word, token) != token)
    if other:
        word = other[0]
        raise MismatchError(
            f"{path}: {len(other)} tokens have other ids, the first {word!r} ({theirs[word]}, here {mine[word]}); "
            "its weights speak another vocabulary"
        )


@dataclass(frozen=True)
class Window:
    """Neighbouring blocks `start` to `stop`, the last counted in; `kind` where one kind of map alone is meant."""

    start: int
    stop: int
    kind: Kind | None = None

    @property
    def width(self) -> int:
        """How many blocks."""
        return self.stop - self.start + 1

    def __str__(self) -> str:
        layers = f"L{self.start}" if self.start == self.stop else f"L{self.start}-L{self.stop}"
        return layers if self.kind is None else f"{layers}.{self.kind}"


def windows(layers: int, widest: int, kinds: Sequence[Kind | None] = (None,)) -> list[Window]:
    """All windows of up to `widest` neighbouring blocks, those with equal start together."""
    return [
        Window(start, stop, kind)
        for kind in kinds
        for start in range(layers)
        for stop in range(start, min(start + widest, layers))
    ]


@dataclass(frozen=True)
class Passed:
    """One ordinary forward over a batch, and what it takes to run any of its blocks again.

    Attributes:
        view: the model.
        batch: the rows.
        entering: layer to [n, t, d], the residual stream before the block.
        calls: layer to how the block was called.
        hidden: [n, t, d] after the final norm.
    """

    view: ModelView
    batch: Batch
    entering: Mapping[int, Tensor]
    calls: Mapping[int, hooks.Call]
    hidden: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, batch: Batch) -> Passed:
        """Run `batch`. Cost: one forward; memory n·t·d a layer."""
        layers = range(view.layers)
        blocks = {layer: view.block(layer) for layer in layers}
        with hooks.record_calls(blocks) as calls, view.record_blocks(layers, side="input") as entering:
            hidden = view.hidden(batch)
        return cls(view, batch, entering, calls, hidden)

    def block(self, layer: int, residual: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The residual stream after block `layer`, called with `tensors` in the place of its own."""
        call, block = self.calls[layer].fitted(len(residual)), self.view.block(layer)
        found: Any = functional_call(block, dict(tensors or {}), (residual, *call.args), dict(call.kwargs))
        return hooks.first(found)

    def above(self, layer: int, residual: Tensor) -> Tensor:
        """After the final norm, were the residual stream before block `layer` this."""
        for index in range(layer, self.view.layers):
            residual = self.block(index, residual)
        return self.view.final_norm(residual)

    def verdict(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row, [n]: mean nats per suffix token, and whether every suffix token is the likeliest."""
        row, column, token, _ = self.batch.suffix_index()
        logits = self.view.unembed(hidden[row, column])
        spoken = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        count = self.batch.length - self.batch.prefix
        total = spoken.new_zeros(len(self.batch)).index_add(0, row, spoken)
        missed = torch.zeros_like(total).index_add(0, row, (logits.argmax(-1) != token).to(total))
        return -total / count, missed == 0


@torch.no_grad()
def rewound(
    passed: Passed, snapshot: Snapshot, wanted: Sequence[Window], kinds: Sequence[Kind] | None
) -> Iterator[tuple[Window, Tensor]]:
    """The final hidden states, [n, t, d], with each window put back to the snapshot.

    Args:
        passed: the ordinary forward.
        snapshot: where the blocks' tensors are read from, block by block.
        wanted: windows as `windows` gives them, so that those with equal start share what they can.
        kinds: kinds of map that are rewound where a window names none; None takes whole blocks.

    Yields:
        Window and hidden states.
    """
    view = passed.view
    for (kind, start), group in itertools.groupby(wanted, key=lambda window: (window.kind, window.start)):
        residual = passed.entering[start]
        for window in group:
            here = part(view, window.stop, kinds if kind is None else (kind,))
            residual = passed.block(window.stop, residual, here.composed(view, earlier_parts(view, snapshot, here)))
            yield window, passed.above(window.stop + 1, residual)


def rewound_passes(layers: int, wanted: Sequence[Window]) -> int:
    """Blocks that `rewound` runs for each token."""
    return sum(1 + layers - 1 - window.stop for window in wanted)


@dataclass(frozen=True)
class Survey:
    """A snapshot seen from afar: a digest of everything that is rewound, and how far it lies from the model.

    Attributes:
        digest: of the tensors, block by block.
        moved: window to ‖earlier - now‖ / ‖now‖ over its parameters.
    """

    digest: str
    moved: Mapping[Window, float]


@torch.no_grad()
def survey(view: ModelView, snapshot: Snapshot, wanted: Sequence[Window], kinds: Sequence[Kind] | None) -> Survey:
    """Read each block of the snapshot once; refuse what does not fit before anything is run.

    Raises:
        CheckpointError, MismatchError: the snapshot is of another architecture, or damaged.
    """
    check_same_kind(view, snapshot)
    squares: dict[tuple[int, Kind | None], tuple[float, float]] = {}
    digests = []
    for layer, kind in sorted({(w.stop, w.kind) for w in wanted}, key=lambda key: (key[0], str(key[1]))):
        here = part(view, layer, kinds if kind is None else (kind,))
        old, block = earlier_parts(view, snapshot, here), view.block(layer)
        digests.append([layer, str(kind), {name: digest_tensor(entry) for name, entry in old.items()}])
        composed = here.composed(view, old)
        gap = size = 0.0
        for name, entry in composed.items():
            live = block.get_parameter(name).detach().float()
            gap += float((entry.float() - live).norm() ** 2)
            size += float(live.norm() ** 2)
        squares[layer, kind] = gap, size
    moved = {}
    for window in wanted:
        pairs = [squares[layer, window.kind] for layer in range(window.start, window.stop + 1)]
        whole = sum(size for _, size in pairs)
        moved[window] = (sum(gap for gap, _ in pairs) / whole) ** 0.5 if whole else 0.0
    return Survey(digest_json(digests), moved)


def suffix_tokens(passages: Passages) -> int:
    """Tokens of all suffixes."""
    return sum(len(item.suffix) for item in passages)
