"""The cells of a sweep: one edit each, made and judged on the model in memory, filed when it is done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from editors.base import Request
from editors.edit import Edit
from editors.trade_offs.budgets import within
from editors.trade_offs.fronts import Judged
from editors.trade_offs.plan import LARGEST, RANDOM, Cell, Plan
from memloc import command, progress, store
from memloc.errors import InputError, MemlocError, TargetError
from memloc.flags import DataFile
from memloc.measurement import Measurement
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.passages import Facts, Passages
from memloc.provenance import Provenance
from memloc.scores import Localization, Selection
from memloc.sites import Grain, Site
from memloc.view import ModelView

SCHEMA = "memloc.trade-off-cell/1"


@dataclass(frozen=True)
class Ground:
    """The model and the data of a plan, opened.

    Attributes:
        view: the model.
        targets: what is to be forgotten.
        kept: group to memorized passages that should stay; those of `retain` are told to the editors.
        given: parts of the request beside targets and selection.
        held_out: ordinary text, or None.
        facts: to be kept, or None.
        controls: passages never trained on, or None.
    """

    view: ModelView
    targets: Passages
    kept: Mapping[str, Passages]
    given: Mapping[str, Passages]
    held_out: Passages | None
    facts: Facts | None
    controls: Passages | None

    @classmethod
    def of(cls, plan: Plan) -> Ground:
        """Open everything.

        Raises:
            InputError, ModelError, CheckpointError: what cannot be opened.
        """
        view = ModelView.open(plan.model)
        head, tail = plan.cut

        def passages(file: DataFile) -> Passages:
            return command.passages_of(file, view, prefix=head, suffix=tail)

        named = ("targets", "retain", "controls")
        known = {name: passages(file) for name, file in plan.files.items() if name in named}
        texts = {name: command.read_text(plan.files.get(name), view) for name in ("text", "held_out")}
        kept = {name: passages(file) for name, file in plan.memorized.items()}
        if "retain" in known:
            kept = {"retain": known["retain"], **kept}
        given = {name: data for name, data in (("retain", known.get("retain")), ("text", texts["text"])) if data}
        facts = command.read_facts(plan.files.get("facts"), view)
        targets = known["targets"][: plan.limit] if plan.limit else known["targets"]
        return cls(view, targets, kept, given, texts["held_out"], facts, known.get("controls"))

    def digests(self) -> dict[str, str]:
        """Of everything that decides a result."""
        parts = {"targets": self.targets, **self.kept, **{f"given {name}": data for name, data in self.given.items()}}
        others = {"held-out": self.held_out, "facts": self.facts, "controls": self.controls}
        found = {name: data.digest for name, data in {**parts, **others}.items() if data is not None}
        return {"model": self.view.digest, **found}

    def judge(self) -> tuple[Judged, dict[str, float]]:
        """The model as it is now: what the frontier is made of, and figures for the table."""
        recite = Extraction()
        targets = recite(self.view, self.targets)
        kept = {name: _recited(recite(self.view, data)) for name, data in self.kept.items()}
        figures = {name: targets[name] for name in ("strict rate", "exact memorization", "mean nll")}
        if self.facts is not None:
            rows = FactRecall()(self.view, self.facts).rows
            kept["facts"] = [float(row["true accuracy"]) for row in rows]
        held = None if self.held_out is None else Perplexity()(self.view, self.held_out)["perplexity"]
        return Judged(_recited(targets), kept, held), figures


@dataclass(frozen=True)
class Outcome:
    """One cell's result.

    Attributes:
        cell: which.
        judged: what the edited model still does.
        figures: of the targets, for the table.
        weights: share of the model's weights whose stored value changed, by the edit's own count of entries.
        moved: Frobenius norm of the change over that of the touched weights.
        failed: why no edit was made, or "".
    """

    cell: Cell
    judged: Judged | None
    figures: Mapping[str, float]
    weights: float = 0.0
    moved: float = 0.0
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        judged = None if self.judged is None else vars(self.judged)
        return {"schema": SCHEMA, **vars(self), "cell": vars(self.cell), "judged": judged}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        """Back from `to_json`."""
        parts = {name: value[name] for name in ("figures", "weights", "moved", "failed")}
        judged = None if value["judged"] is None else Judged(**value["judged"])
        return cls(Cell(**value["cell"]), judged, **parts)


def run(plan: Plan, ground: Ground, folder: Path, *, shard: tuple[int, int] = (0, 1)) -> dict[str, Outcome]:
    """Make and judge every edit that has no result in `folder` yet; key to outcome, also of those found there.

    Args:
        plan: what is swept.
        ground: its model and data, opened.
        folder: one JSON file a cell, written when it is done.
        shard: (index, count): only every count-th missing cell, from index on.

    An edit that a method refuses (a grain it cannot use, nothing to do) is an outcome too: the table says why.

    Raises:
        TargetError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{folder} cannot be made: {error.strerror}; nothing was run") from error
    digests = ground.digests()
    wanted = {plan.key(cell, digests): cell for cell in plan.cells()}
    found = {key: done for key in wanted if (done := _found(folder / f"{key}.json", wanted[key])) is not None}
    work = _Work(plan, ground)
    missing = [key for key in wanted if key not in found][shard[0] :: shard[1]]
    for count, key in enumerate(missing, 1):
        found[key] = work.outcome(wanted[key])
        store.write_text(folder / f"{key}.json", json.dumps(found[key].to_json(), allow_nan=False) + "\n")
        progress.tell("edits", count, len(missing), f"{wanted[key].how} {wanted[key].where}")
    return {key: found[key] for key in wanted if key in found}


def _recited(measured: Measurement) -> list[float]:
    return [float(row["strict"]) for row in measured.rows]


def _found(path: Path, cell: Cell) -> Outcome | None:
    try:
        return replace(Outcome.from_json(json.loads(path.read_text(encoding="utf8"))), cell=cell)
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Work:
    """Localizations are computed once each."""

    def __init__(self, plan: Plan, ground: Ground) -> None:
        self.plan, self.ground = plan, ground
        self._localized = cache(self._localization)

    def outcome(self, cell: Cell) -> Outcome:
        view = self.ground.view
        how = next(entry for entry in self.plan.how if entry.label == cell.how)
        try:
            chosen = None if how.alone else self._selection(cell)
            asked = Request(forget=self.ground.targets, selection=chosen, seed=cell.seed, **self.ground.given)  # type: ignore[arg-type]
            edit = how.method(view, asked)
            with edit.apply(view):
                judged, figures = self.ground.judge()
        except MemlocError as error:
            return Outcome(cell, None, {}, failed=str(error))
        return Outcome(cell, judged, figures, _weights(view, edit), _moved(view, edit))

    def _selection(self, cell: Cell) -> Selection:
        view, found = self.ground.view, self._localized(cell.where)
        chosen = within(view, found, cell.budget or 0.0)
        if cell.control == RANDOM:
            # One place a site, as layers and components are, leaves a draw at every site no choice.
            per = "model" if chosen.grain in (Grain.COMPONENT, Grain.LAYER) else "site"
            return chosen.random_like(1000 * cell.seed + cell.draw, per=per)
        return largest(view, chosen) if cell.control == LARGEST else chosen

    def _localization(self, label: str) -> Localization:
        where = next(entry for entry in self.plan.where if entry.label == label)
        if where.file is not None:
            found = Localization.load(where.file)
            if found.provenance.inputs.get("model") not in (None, self.ground.view.digest):
                raise InputError(f"{where.file} was made on another model than {self.plan.model}; localize on this one")
            return found
        contrast = self.ground.controls if self.ground.controls is not None else self.ground.given.get("text")
        made: Localization = where.method(self.ground.view, self.ground.targets, contrast=contrast)
        return made


def largest(view: ModelView, chosen: Selection) -> Selection:
    """As many places at every site as `chosen` has, those with the largest weights: the magnitude control.

    A weight is judged by its absolute value, a neuron, head, component or layer by the norm of what it may change.
    """
    masks = {}
    for site, mask in chosen.masks.items():
        flat = mask.reshape(-1)
        size = _sizes(view, chosen.grain, site, mask).reshape(-1)
        best = torch.zeros_like(flat)
        best[size.argsort(descending=True, stable=True)[: int(flat.sum())]] = True
        masks[site] = best.reshape(mask.shape)
    if chosen.grain in (Grain.COMPONENT, Grain.LAYER):
        masks = _largest_of_all(view, chosen)
    return Selection(chosen.grain, masks, Provenance("magnitude", {}, None, {"model": view.digest}))


def _sizes(view: ModelView, grain: Grain, site: Site, mask: torch.Tensor) -> torch.Tensor:
    weight = view.weight(site).detach().float().cpu()
    if grain is Grain.WEIGHT:
        return weight.abs()
    squares = weight.square()
    if grain is Grain.NEURON:
        return squares.sum(0)
    if grain is Grain.HEAD:
        return squares.reshape(len(weight), view.heads, -1).sum((0, 2))
    return squares.sum().reshape(mask.shape)


def _largest_of_all(view: ModelView, chosen: Selection) -> dict[Site, torch.Tensor]:
    """Components and layers are one place a site, so they are compared across sites."""
    sites = list(chosen.masks)
    mean = {site: float(view.weight(site).detach().float().square().mean()) for site in sites}
    best = sorted(sites, key=lambda site: -mean[site])[: sum(bool(mask) for mask in chosen.masks.values())]
    return {site: torch.tensor(site in best).reshape(chosen.masks[site].shape) for site in sites}


def _weights(view: ModelView, edit: Edit) -> float:
    total = sum(parameter.numel() for parameter in view.model.parameters())
    return float(edit.count / total)


def _moved(view: ModelView, edit: Edit) -> float:
    whole = sum(float(view.weight(site).detach().double().square().sum()) for site in edit.deltas)
    return math.sqrt(sum(norm**2 for norm in edit.norms.values()) / max(whole, 1e-300))
