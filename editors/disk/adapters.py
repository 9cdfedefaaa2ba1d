"""PEFT LoRA folders, read strictly: factors by module, scaled; and bound to the sites of a model.

A module's change is `scale * B @ A`, with B [out, r] and A [r, in] for every layer class (PEFT turns them for GPT-2's
`Conv1D` itself); an embedding [v, d] keeps them the other way round. Scale is alpha / r, or alpha / sqrt(r) with
`use_rslora`; both patterns of the config are honoured as PEFT does. Whatever else an adapter can hold is refused by
name: half an adapter would be another adapter. torch's pickles are not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editors.deltas import Delta, LowRank
from editors.disk.edit_record import read_record
from editors.disk.shards import PICKLES, Entry, open_weights, read_header, read_json
from editors.patch import DTYPES, dtype_name
from memloc.errors import CheckpointError, MismatchError
from memloc.provenance import digest_raw, digest_tensor
from memloc.sites import MAPS, Site

if TYPE_CHECKING:
    from memloc.view import ModelView

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before a module path."""

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
"""How the two factors of a linear map and of an embedding are called."""

_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora",
)  # fmt: skip
"""Settings that add something `scale * B @ A` is not."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of a folder.

    Attributes:
        folder: it was read from.
        base: what its config calls the model it is for, or "".
        factors: module path to `[out, in]` of low rank, scaled.
        digest: of names and factors.
        edits: what memloc's own record beside it says of the edits in it; empty for others' adapters.
    """

    folder: Path
    base: str
    factors: Mapping[str, LowRank]
    digest: str
    edits: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, folder: str | Path) -> Adapter:
        """Read a folder that PEFT or `export_adapter` wrote.

        Raises:
            CheckpointError: missing, pickled, cut off, no LoRA, merged into a whole model, or with parts that are no
                low-rank change of a weight.
        """
        folder = Path(folder)
        config = _config(folder)
        entries = read_header(folder / TENSORS)
        factors, total = {}, []
        for module, pair in sorted(_pairs(folder, entries).items()):
            factors[module] = _factor(folder, config, module, pair)
            total += [digest_tensor(factors[module].left), digest_tensor(factors[module].right)]
        text = json.dumps([sorted(factors), total]).encode()
        base = config.get("base_model_name_or_path") or ""
        return cls(folder, str(base), factors, digest_raw("U8", (), text), tuple(read_record(folder)))

    def deltas(self, view: ModelView, *, any_base: bool = False) -> dict[Site, Delta]:
        """Site to delta on `view`, which must be the adapter's base with the adapter not in it.

        Args:
            view: the model.
            any_base: take a model of another name where nothing but names can be compared.

        Raises:
            MismatchError: another base, another shape, or the adapter is already in these weights.
        """
        if any(name.endswith((".lora_A", ".base_layer")) for name, _ in view.model.named_modules()):
            raise MismatchError(f"{view.name} holds an adapter already; unload it first; nothing was changed")
        found: dict[Site, Delta] = {}
        homes: dict[str, list[Site]] = {}
        for site in view.sites(*MAPS):
            homes.setdefault(view.place(site).parameter, []).append(site)
        for module, factor in self.factors.items():
            found |= self._bind(view, module, factor, homes.get(f"{module}.weight", []))
        self._expect_base(view, any_base=any_base)
        return found

    def _bind(self, view: ModelView, module: str, factor: LowRank, sites: list[Site]) -> dict[Site, Delta]:
        if not sites:
            raise MismatchError(f"{self.folder}: {module} is no map of {view.name}; the adapter is of another base")
        place = view.place(sites[0])
        stored = tuple(view.parameter(sites[0]).shape)
        whole = stored[::-1] if place.transposed else stored
        if factor.shape != whole:
            raise MismatchError(
                f"{self.folder}: {module} is {list(factor.shape)}, {view.name} has {list(whole)}; the adapter is of "
                "another base"
            )
        cut: dict[Site, Delta] = {}
        for site in sites:
            rows = view.place(site).rows
            left = factor.left if rows is None else factor.left[rows if isinstance(rows, slice) else list(rows)]
            terms = (left != 0).any(0)
            if bool(terms.any()):
                cut[site] = LowRank(left[:, terms], factor.right[terms])
        return cut

    def _expect_base(self, view: ModelView, *, any_base: bool) -> None:
        told = {name: entry for edit in self.edits for name, entry in edit["tensors"].items()}
        if told:
            self._expect_digests(view, told)
        elif self.base and (Path(self.base) / "config.json").is_file():
            self._expect_folder(view, Path(self.base))
        elif self.base and not any_base:
            names = {view.name, str(getattr(view.config, "_name_or_path", ""))} - {""}
            if not any(name == self.base or Path(name).name == Path(self.base).name for name in names):
                raise MismatchError(
                    f"{self.folder} is an adapter of {self.base}, this model is {view.name}; pass any_base if they are "
                    "the same weights"
                )

    def _expect_digests(self, view: ModelView, told: Mapping[str, Mapping[str, Any]]) -> None:
        for name, entry in told.items():
            try:
                parameter, _, expert = entry["parameter"].removesuffix("]").partition("[")
                live = view.model.get_parameter(parameter)
                found = digest_tensor(live[int(expert)] if expert else live)
            except AttributeError:
                where = f"{self.folder}: its record names {entry['parameter']}"
                raise MismatchError(f"{where}, which {view.name} has not: another base") from None
            if found == entry["after"]:
                raise MismatchError(f"{self.folder}: {name} of {view.name} holds the adapter already, merged")
            if found != entry["before"]:
                raise MismatchError(
                    f"{self.folder}: the adapter was made for {name} with digest {entry['before'][:12]}, {view.name} "
                    f"has {found[:12]}: another base"
                )

    def _expect_folder(self, view: ModelView, base: Path) -> None:
        weights = open_weights(base)
        for module, factor in self.factors.items():
            live = view.model.get_parameter(f"{module}.weight")
            entry = weights.entries[weights.resolve(f"{module}.weight")]
            old = _tensor(entry.read(base), entry)
            if (entry.dtype, digest_tensor(old)) == (dtype_name(live), digest_tensor(live)):
                continue
            moved = live.detach().cpu().double() - old.double()
            change = factor.dense().double()
            change = change if change.shape == moved.shape else change.T
            if float((moved - change).norm()) < 0.1 * float(change.norm()):
                raise MismatchError(f"{self.folder}: {module} of {view.name} holds the adapter already, merged")
            raise MismatchError(f"{self.folder}: {module} of {view.name} is not that of {base}, the adapter's base")


def _config(folder: Path) -> dict[str, Any]:
    """The config of a folder that holds a LoRA adapter and nothing that must be refused."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is no PEFT adapter")
    config = read_json(path, path.read_bytes())
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA is a low-rank change")
    if not (folder / TENSORS).is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
            raise CheckpointError(f"{folder} holds a whole model; the adapter is merged into it already")
        pickles = [name for name in names if name.endswith(PICKLES)]
        what = f"only a pickle ({pickles[0]}), which can run code; convert to" if pickles else "no"
        raise CheckpointError(f"{folder} holds {what} {TENSORS}")
    for name in _REFUSED:
        if config.get(name):
            raise CheckpointError(f"{path}: {name} is set, which is not a low-rank change of a weight")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; an adapter with biases cannot be read as an edit")
    return config


def _pairs(folder: Path, entries: Mapping[str, Entry]) -> dict[str, tuple[Entry, Entry, bool]]:
    """Module path to its two factors, and whether it is an embedding."""
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        bare = name.removeprefix(PREFIX)
        ending = next((part for part in (*LINEAR, *EMBEDDING) if bare.endswith(f".{part}")), None)
        if ending is None or bare == name:
            raise CheckpointError(f"{folder / TENSORS} holds {name}, which is no factor of a low-rank change")
        found.setdefault(bare.removesuffix(f".{ending}"), {})[ending] = entry
    pairs = {}
    for module, parts in found.items():
        wanted = LINEAR if LINEAR[0] in parts else EMBEDDING
        if set(parts) != set(wanted):
            raise CheckpointError(f"{folder / TENSORS}: {module} has {' and '.join(sorted(parts))}, expected {wanted}")
        pairs[module] = (parts[wanted[0]], parts[wanted[1]], wanted is EMBEDDING)
    if not pairs:
        raise CheckpointError(f"{folder / TENSORS} holds no factor")
    return pairs


def _factor(folder: Path, config: Mapping[str, Any], module: str, pair: tuple[Entry, Entry, bool]) -> LowRank:
    *entries, embedding = pair
    for entry in entries:
        if entry.dtype not in DTYPES or len(entry.shape) != 2:
            raise CheckpointError(f"{folder / TENSORS}: {module} is {entry.dtype} {list(entry.shape)}; not a factor")
    first, second = (_tensor(entry.read(folder), entry) for entry in entries)
    rank = _pattern(folder, config, "rank_pattern", module, config.get("r"))
    if not first.shape[0] == second.shape[1] == rank or rank == 0:
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise CheckpointError(f"{folder}: {module} has factors {shapes}, the config says rank {rank}")
    alpha = _pattern(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for part in (first, second):
        if not bool(torch.isfinite(part).all()):
            raise CheckpointError(f"{folder / TENSORS}: {module} holds values that are not finite")
    left, right = (first.T, second.T) if embedding else (second, first)
    return LowRank(left.double() * scale, right)


def _pattern(folder: Path, config: Mapping[str, Any], name: str, module: str, default: Any) -> float:
    """The entry of a pattern for `module`, by PEFT's rule: the first key that ends the path."""
    table = config.get(name) or {}
    try:
        for key, value in table.items():
            if re.match(rf"(.*\.)?({key})$", module):
                default = value
                break
        if isinstance(default, bool) or not math.isfinite(default):
            raise TypeError
    except (AttributeError, TypeError, re.error):
        raise CheckpointError(f"{folder / CONFIG}: no usable {name}, rank or alpha for {module}") from None
    return float(default)


def _tensor(data: bytearray, entry: Entry) -> Tensor:
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
