"""The demo's work: unlearn, edit facts, write and undo checkpoints, each with its control and measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from editors.base import Request
from editors.control import random_like
from editors.demo.material import Material
from editors.edit import Edit
from editors.rewriters.rome import Rome
from editors.rewriters.sparse_fine_tune import SparseFineTune
from editors.shipping.checkpoint import apply_edit, undo_edit
from editors.trial import Group, Measured, measure_groups
from editors.verification import Material as Asked
from editors.verification import Verification, verify
from memloc.loading import quiet
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.weight_gradient import WeightGradient
from memloc.measurement import Measurement
from memloc.measures.facts import FactRecall, pooled
from memloc.moments import second_moments
from memloc.passages import Facts
from memloc.progress import steps
from memloc.report import Verdict
from memloc.scores import Localization, Selection
from memloc.sites import Kind
from memloc.view import ModelView


@dataclass(frozen=True)
class Unlearned:
    """Unlearning and its random control, measured."""

    groups: tuple[Group, ...]
    edit: Edit
    control: Edit
    selection: Selection
    before: Measured
    after: Measured
    random: Measured


@dataclass(frozen=True)
class Rewritten:
    """Facts edited one by one, each measured alone and pooled."""

    edit: Edit
    facts: Facts
    before: Measurement
    after: Measurement
    random: Measurement


@dataclass(frozen=True)
class Mapped:
    """Where the targets are kept, each beside the controls.

    Attributes:
        weights: gradient of the targets' loss, weight by weight: what unlearning selects from.
        shares: each full-dose passage's gradient by map, as shares of its own total.
        shares_control: the same for the controls.
        neurons: integrated gradients of the targets.
        neurons_control: the same for as many controls.
    """

    weights: Localization
    shares: Localization
    shares_control: Localization
    neurons: Localization
    neurons_control: Localization


@dataclass(frozen=True)
class Found:
    """Everything the demo's stages came up with."""

    data: Material
    planted: Measurement
    maps: Mapped
    gone: Unlearned
    few: Unlearned
    chance: tuple[Measurement, ...]
    changed: Rewritten
    shipped: tuple[Verdict, ...]
    checked: Verification


def localize(view: ModelView, data: Material) -> Mapped:
    """Where the targets are kept, by three methods."""
    maps = WeightGradient(grain="component", reduce="sum", per_passage=True)
    neurons = IntegratedGradients()
    return Mapped(
        weights=WeightGradient(grain="weight", scale="raw")(view, data.targets),
        shares=maps(view, data.targets + data.named + data.unnamed),
        shares_control=maps(view, data.controls),
        neurons=neurons(view, data.targets),
        neurons_control=neurons(view, data.controls[: len(data.targets)]),
    )


def unlearn(
    view: ModelView,
    data: Material,
    groups: tuple[Group, ...],
    selection: Selection,
    editor: SparseFineTune,
    seed: int,
) -> Unlearned:
    """Take the targets out where `selection` says, and in as many weights at random; measure both."""
    request = Request(forget=data.targets, retain=data.named, text=data.kept_text, selection=selection, seed=seed)
    before = measure_groups(view, groups)
    edit = editor(view, request)
    after = _under(edit, view, lambda: measure_groups(view, groups))
    control = editor(view, replace(request, selection=selection.random_like(seed)))
    beside = _under(control, view, lambda: measure_groups(view, groups))
    return Unlearned(groups, edit, control, selection, before, after, beside)


def fewest_steps(
    view: ModelView, data: Material, group: Group, selection: Selection, editor: SparseFineTune, seed: int
) -> SparseFineTune:
    """`editor` with the fewest steps after which none of `group` is recited under `selection`, at most its own.

    Only the chosen weights are asked, so that their random controls then run for as many steps and no more.
    """
    request = Request(forget=data.targets, retain=data.named, text=data.kept_text, selection=selection, seed=seed)
    for count in range(1, editor.steps):
        shorter = replace(editor, steps=count)
        edit = shorter(view, request)
        if not _under(edit, view, lambda: group.measure(view, group.items))["strict rate"]:
            return shorter
    return editor


def by_chance(
    view: ModelView, data: Material, group: Group, selection: Selection, editor: SparseFineTune, seeds: Sequence[int]
) -> tuple[Measurement, ...]:
    """The same edit in as many random weights, once a seed, measured on one group: one mask may be lucky."""
    request = Request(forget=data.targets, retain=data.named, text=data.kept_text)
    found = []
    for seed in steps(seeds, "random masks"):
        edit = editor(view, replace(request, selection=selection.random_like(seed), seed=seed))
        found.append(_under(edit, view, lambda: group.measure(view, group.items)))
    return tuple(found)


def rewrite(view: ModelView, data: Material, editor: Rome, seed: int) -> Rewritten:
    """Change every fact alone, measure it under its own edit and under a random one of equal norm; pool."""
    recall = FactRecall()
    # Once for all facts: every one of them starts from the same model.
    editor = replace(editor, moment=second_moments(view, data.kept_text, view.sites(Kind.MLP_OUT)))
    first: Edit | None = None
    before, after, beside = [], [], []
    for index in steps(range(len(data.facts)), "facts edited one by one"):
        one = data.facts[index : index + 1]
        edit = editor(view, Request(facts=one, text=data.kept_text, seed=seed))
        first = first or edit
        before.append(recall(view, one))
        after.append(_under(edit, view, lambda one=one: recall(view, one)))  # type: ignore[misc]
        control = random_like(edit, view, seed)
        beside.append(_under(control, view, lambda one=one: recall(view, one)))  # type: ignore[misc]
    if first is None:
        raise ValueError("no facts")
    pools = [pooled(parts, data.facts) for parts in (before, after, beside)]
    return Rewritten(first, data.facts, *pools)


def _under(edit: Edit, view: ModelView, work: Callable[[], Any]) -> Any:
    with edit.apply(view):
        return work()


def check(view: ModelView, data: Material, edit: Edit, folder: Path, seed: int) -> Verification:
    """Ask whether the targets are gone or only hidden, and what else broke; a report of its own in `folder`."""
    asked = Asked(
        targets=data.targets, controls=data.controls, retain=data.named, memorized=data.unnamed, facts=data.facts,
        text=data.held_out,
    )  # fmt: skip
    found = verify(view, edit, asked, seed=seed, folder=folder / "checks")
    found.save(folder)
    return found


def ship(
    edit: Edit, lab: Path, folder: Path, group: Group | None = None, after: Measured | None = None
) -> list[Verdict]:
    """Write the checkpoint, load it with plain transformers, and undo it again; say what was seen."""
    from transformers import AutoModelForCausalLM

    if (folder / "memloc_edit.json").is_file():
        shutil.rmtree(folder)
    apply_edit(edit, lab, folder)
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(folder)
    view = ModelView.open(lab)
    with edit.apply(view):
        ids = torch.arange(1, 9)[None]
        with torch.no_grad():
            same = torch.equal(plain(ids).logits, view.model(ids).logits)
    found = [
        Verdict(f"{folder.name}/ loads in plain transformers and speaks as measured", same, "logits equal to the bit")
    ]
    if group is not None and after is not None:
        rows = group.measure(ModelView.open(folder), group.items).rows
        kept = [row["strict"] for row in rows] == [row["strict"] for row in after[group.name].rows]
        found.append(
            Verdict(f"{folder.name}/ reloaded gives the same verdict on every target", kept, f"{len(rows)} of them")
        )
    with tempfile.TemporaryDirectory() as scratch:
        undone = Path(scratch) / "undone"
        undo_edit(edit, folder, undone)
        back = (undone / "model.safetensors").read_bytes() == (lab / "model.safetensors").read_bytes()
    found.append(Verdict(f"Undoing {folder.name}/ gives back the original weights file", back, "byte by byte"))
    return found
