"""Trials: every method on every known answer, each result kept as it is finished, so that an interrupt loses one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memloc import hooks
from memloc.errors import MemlocError, MismatchError
from memloc.progress import tell
from memloc.provenance import digest_bytes, digest_json, settings_of
from memloc.sites import Grain
from memloc.store import write_text
from memloc.truth.entrants import CONTRAST, entrant, source_digest
from memloc.truth.worlds import Ground, Known, World

FORMAT = 1
"""Counted up when results of before are not comparable."""

UNASKED = ("trials", "table", "entrants", "grounds")
"""Files of this package on which no known answer depends."""


@dataclass(frozen=True)
class Trial:
    """One method on one known answer.

    Attributes:
        world: its name in the table of worlds.
        ground: name of the model it was made from.
        seed: of the ground.
        known: name of the known answer.
        method: name of the localizer.
        figures: what it was worth; empty where it failed.
        failed: why, in one line; "" where it did not.
        crashed: it failed by an error nobody raised on purpose; the next run tries again.
        seconds: of CPU, all threads together.
        forward: block-tokens.
        backward: likewise.
    """

    world: str
    ground: str
    seed: int
    known: str
    method: str
    figures: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""
    crashed: bool = False
    seconds: float = 0.0
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Made:
    """What is known of one known answer beside its gold: losses, a causal check, or why it could not be made."""

    world: str
    ground: str
    seed: int
    known: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    failed: str = ""


@dataclass(frozen=True)
class Trials:
    """All results.

    Attributes:
        trials: one a method and known answer.
        made: one a known answer.
    """

    trials: tuple[Trial, ...]
    made: tuple[Made, ...]


def run(
    worlds: Mapping[str, World],
    grounds: Iterable[Ground],
    methods: Sequence[str],
    out: str | Path,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Trials:
    """Judge `methods` on all known answers of `worlds`, or read what was judged before.

    Args:
        worlds: name to world.
        grounds: what known answers are made from; one is held in memory at a time.
        methods: names of localizers and baselines.
        out: folder of results; `out/trials` has one small file a trial, named after what it depends on.
        settings: of methods, beside their defaults.

    Returns:
        Trials in the order of grounds, worlds, known answers and methods.

    Raises:
        MemlocError: a world or a ground cannot be used at all. A method that fails is a result.
    """
    out, chosen = Path(out), settings or {}
    unfit: dict[tuple[str, Grain], str] = {}
    trials: list[Trial] = []
    made: list[Made] = []
    for ground in grounds:
        ground = dataclasses.replace(ground, keep=out / "kept")
        here = _digest(ground)
        for label, world in worlds.items():
            for name in world.names(ground):
                cell = _Cell(out / "trials", label, world, ground, here, name, unfit)
                found, known = cell.judged(methods, chosen)
                trials += found
                made.append(known)
    return Trials(tuple(trials), tuple(made))


@dataclass(frozen=True)
class _Cell:
    """One known answer and its results on disk; made only when a result is missing."""

    out: Path
    label: str
    world: World
    ground: Ground
    digest: str
    name: str
    unfit: dict[tuple[str, Grain], str]

    def judged(self, methods: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> tuple[list[Trial], Made]:
        """Results of all methods, and what is known of the known answer."""
        kept = {method: self._read(self._path(method, settings)) for method in methods}
        beside = self._read(self._path("", {}))
        missing = [method for method in methods if kept[method] is None]
        if beside is None or missing:
            beside = self._made(missing, settings, kept)
        trials = [Trial(**value) for method in methods if (value := kept[method]) is not None]
        return trials, Made(**beside)

    def _made(
        self, missing: Sequence[str], settings: Mapping[str, Mapping[str, Any]], kept: dict[str, Any]
    ) -> dict[str, Any]:
        """Make the known answer and judge what is missing, result by result."""
        about = {"world": self.label, "ground": self.ground.name, "seed": self.ground.seed, "known": self.name}
        where = f"{self.label}, {self.ground.name} seed {self.ground.seed}, {self.name}"
        try:
            known = self.world.make(self.ground, self.name)
        except MemlocError as error:
            failed = {**about, "failed": _line(error)}
            kept.update({method: {**failed, "method": method} for method in missing})
            return failed
        beside = {**about, "notes": dict(known.notes)}
        self._write(self._path("", {}), beside)
        for index, method in enumerate(missing):
            tell(where, index, len(missing), method)
            found = {**about, "method": method, **self._judged(known, method, settings.get(method, {}))}
            if not found.get("crashed"):
                self._write(self._path(method, settings), found)
            kept[method] = found
        tell(where, len(missing), len(missing))
        return beside

    def _judged(self, known: Known, method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A method whose scores were of another grain once is not run for that grain again."""
        why = self.unfit.get((method, known.grain))
        if why is not None:
            return {"failed": why}
        found = judge(known, method, changes)
        if f"and no {known.grain}s" in found.get("failed", ""):
            self.unfit[method, known.grain] = found["failed"]
        return found

    def _path(self, method: str, settings: Mapping[str, Mapping[str, Any]]) -> Path:
        """A file named after everything its result depends on."""
        parts: list[Any] = [FORMAT, _code(), self.label, settings_of(self.world), self.digest, self.name]
        if method:
            parts += [method, dict(settings.get(method, {})), source_digest(method)]
        folder = self.out / self.label / f"{self.ground.name}-{self.ground.seed}" / self.name
        return folder / f"{method or 'known'}-{digest_json(parts)[:12]}.json"

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError):
            return None

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def judge(known: Known, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Run a method on a known answer: figures, or why there are none, with what it took."""
    blocks = [known.view.block(layer) for layer in range(known.view.layers)]
    started = time.process_time()
    traffic = hooks.Traffic()
    try:
        method = entrant(name, known.grain, changes)
        contrast = getattr(known, CONTRAST[name]) if name in CONTRAST else None
        with hooks.count_tokens(blocks) as traffic:
            found = method(known.view, known.passages, contrast=contrast)
        spent = time.process_time() - started
        if found.grain is not known.grain:
            raise MismatchError(f"{name} scores {found.grain}s, and no {known.grain}s")
        figures = _figures(known, found)
    except Exception as error:
        seconds = time.process_time() - started
        return {"failed": _line(error), "crashed": not isinstance(error, MemlocError), "seconds": seconds}
    return {"figures": figures, "seconds": spent, "forward": traffic.forward, "backward": traffic.backward}


def _figures(known: Known, found: Any) -> dict[str, float]:
    return {name: float(value) for name, value in known.judge(known, found).items()}


def _digest(ground: Ground) -> str:
    """Of all that known answers are made from."""
    sets = [None if part is None else part.digest for part in (ground.memorized, ground.unknown, ground.text)]
    return digest_json([None if ground.view is None else ground.view.digest, *sets, ground.seed])


def _code() -> str:
    """Digest of the files that known answers are made by: results of other versions of them are not reused."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in UNASKED)
    return digest_bytes(*(path.read_bytes() for path in files))


def _line(error: Exception) -> str:
    """An error as one line: what memloc says on purpose as it is, anything else with its kind."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, MemlocError) else f"{type(error).__name__}: {text}"
