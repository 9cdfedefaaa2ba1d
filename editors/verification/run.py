"""`verify`: every check on the model before and after the edit, every group under the edit and its controls."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from editors.control import random_like
from editors.edit import Edit
from editors.trial import Group, Measured, measure_groups
from editors.verification.battery import Attempt, attempts
from editors.verification.collateral import compared, damages, groups_of
from editors.verification.judging import Finding, judged
from editors.verification.magnitude import magnitude_like
from editors.verification.material import Effort, Material
from editors.verification.quantised import BITS, moved_share
from editors.verification.scores import Scores
from editors.verification.verification import Verification
from memloc.errors import ArtifactError, InputError
from memloc.measurement import Measurement
from memloc.progress import steps
from memloc.provenance import Provenance, digest_json
from memloc.store import write_text
from memloc.view import ModelView


def verify(
    view: ModelView,
    edit: Edit | ModelView,
    data: Material,
    *,
    effort: Effort | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    only: Sequence[str] | None = None,
) -> Verification:
    """Whether what an edit took out is gone or only hidden, and what else broke.

    Args:
        view: the model before the edit; it is as it was, to the bit, when this returns.
        edit: the edit, or the edited model itself where there is no edit file (then without controls of equal size).
        data: targets, never-seen controls, and what should stay.
        effort: how hard to try; `Effort.named("quick")` by default.
        seed: of everything random.
        folder: where the scores of every finished check are kept, so that an interrupted run goes on where it stopped.
        only: names of the checks to make; all by default. What was left out is named in the result.

    Raises:
        InputError: no check of a name in `only`, a passage the model cannot take.
        MismatchError: the edit was made for another model.

    Cost: each check twice, before and after; a copy of the model for rounding, and one with Adam's state (four times
    the model in float32) for relearning. Nothing is written but `folder`.
    """
    effort = effort or Effort()
    known = {check.name for attempt in attempts() for check in attempt.checks}
    for name in only or ():
        if name not in known:
            raise InputError(f"no check called {name!r}; checks: {', '.join(sorted(known))}")
    kept = Kept(view, edit, data, effort, seed, folder)
    findings, untested = _findings(view, edit, data, kept, only)
    groups = groups_of(view, data)
    measured = _measured(view, edit, groups, kept)
    before, after = measured["before"], measured["after"]
    random, magnitude = measured.get("random", {}), measured.get("magnitude", {})
    inputs = {"model": view.digest, "edit": kept.edit, "data": data.digest}
    return Verification(
        model=view.name,
        findings=tuple(findings),
        untested=untested,
        comparisons=compared(groups, before, after, random),
        damages=damages(groups, before, after, random, magnitude),
        moved=_moved(edit, view),
        edit=edit.summary() if isinstance(edit, Edit) else {},
        provenance=Provenance("verify", asdict(effort), seed, inputs),
    )


class Kept:
    """Finished work, one JSON file each; a file of another model, edit, data or effort is not read.

    Attributes:
        edit: digest of the edit, or of the edited model.
    """

    def __init__(
        self,
        view: ModelView,
        edit: Edit | ModelView,
        data: Material,
        effort: Effort,
        seed: int,
        folder: str | Path | None,
    ) -> None:
        self.edit, self.effort, self.seed, self.data = edit.digest, effort, seed, data
        self.folder = None if folder is None else Path(folder)
        self._key = [view.digest, self.edit, data.digest, asdict(effort), seed]

    def get(self, name: str, arm: str, make: Callable[[], Any]) -> Any:
        """What `make` gives (JSON values), or what it gave before."""
        if self.folder is None:
            return make()
        path, key = self.folder / f"{name}.{arm}.json", digest_json([*self._key, name, arm])
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(path.read_text(encoding="utf8"))
            if found["key"] == key:
                return found["value"]
        value = make()
        write_text(path, json.dumps({"key": key, "value": value}) + "\n")
        return value


def _findings(
    view: ModelView, edit: Edit | ModelView, data: Material, kept: Kept, only: Sequence[str] | None
) -> tuple[list[Finding], dict[str, str]]:
    findings: list[Finding] = []
    untested: dict[str, str] = {}
    for attempt in steps(attempts(), "verify"):
        wanted = [check for check in attempt.checks if only is None or check.name in only]
        untested |= {check.title: "not asked for" for check in attempt.checks if check not in wanted}
        if not wanted:
            continue
        try:
            before = _scores(view, attempt, "before", data, kept)
            with edited(view, edit) as changed:
                after = _scores(changed, attempt, "after", data, kept)
        except InputError as error:
            untested |= {check.title: str(error) for check in wanted}
            continue
        for check in wanted:
            how: dict[str, Any] = {"taught": check.taught, "direct": check.direct, "seed": kept.seed}
            pair = after[check.name], before[check.name]
            findings.append(
                judged(check.name, check.title, check.tried, *pair, permutations=kept.effort.permutations, **how)
            )
    return findings, untested


def _scores(view: ModelView, attempt: Attempt, arm: str, data: Material, kept: Kept) -> dict[str, Scores]:
    def make() -> dict[str, Any]:
        made = attempt.probe(view, data, kept.effort, kept.seed)
        return {name: entry.to_json() for name, entry in made.items()}

    try:
        return {name: Scores.from_json(entry) for name, entry in kept.get(attempt.name, arm, make).items()}
    except ArtifactError:
        return attempt.probe(view, data, kept.effort, kept.seed)


@contextlib.contextmanager
def edited(view: ModelView, edit: Edit | ModelView) -> Iterator[ModelView]:
    """The edited model, inside the block; `view` is as it was afterwards."""
    if isinstance(edit, ModelView):
        yield edit
    else:
        with edit.apply(view):
            yield view


def _measured(view: ModelView, edit: Edit | ModelView, groups: Sequence[Group], kept: Kept) -> dict[str, Measured]:
    """Every group before the edit, after it, and under controls of equal size."""
    arms: dict[str, Callable[[], Edit | ModelView]] = {"after": lambda: edit}
    if isinstance(edit, Edit):
        arms["random"] = lambda: random_like(edit, view, kept.seed)
        arms["magnitude"] = lambda: magnitude_like(edit, view)
    found = {"before": _group_figures(view, groups, "before", kept)}
    for name, make in steps(list(arms.items()), "verify: what else broke"):
        with edited(view, make()) as changed:
            found[name] = _group_figures(changed, groups, name, kept)
    return found


def _group_figures(view: ModelView, groups: Sequence[Group], arm: str, kept: Kept) -> Measured:
    def make() -> dict[str, Any]:
        return {name: entry.to_json() for name, entry in measure_groups(view, groups).items()}

    return {name: Measurement.from_json(entry) for name, entry in kept.get("collateral", arm, make).items()}


def _moved(edit: Edit | ModelView, view: ModelView) -> dict[int, float]:
    """Bits to the share of edited weights that lie in another bucket after the edit."""
    return {bits: moved_share(edit, view, bits) for bits in BITS} if isinstance(edit, Edit) else {}
