"""Cells are run: one after another or in several processes, each result kept as it comes, and none computed twice."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memloc.ablations.ablation import REFERRING
from memloc.ablations.components import parts_of
from memloc.errors import ArtifactError, InputError, MismatchError, TargetError
from memloc.grids.cells import Cell, Plan, prefixes_of
from memloc.measurement import Measurement
from memloc.progress import tell
from memloc.view import ModelView


@dataclass(eq=False)
class Bench:
    """Runs cells of a plan; holds one model at a time.

    Attributes:
        plan: what is to be run.
        folder: where results are kept, each under its cell's key.
    """

    plan: Plan
    folder: Path
    _view: ModelView | None = field(default=None, repr=False)
    _name: str = ""

    def run(self, cell: Cell) -> None:
        """Measure, and keep the result.

        Raises:
            MismatchError: the model's weights are not those the plan was made for.
        """
        view = self._open(cell)
        data = self.plan.data[cell.model, cell.asked.data]
        if cell.ablation is None:
            measured = cell.asked.measure(view, data)
        else:
            prefixes = prefixes_of(cell.ablation, self.plan.rows[cell.model, cell.asked.data])
            reference = self.plan.references.get(cell.model)
            with cell.ablation.applied(view, reference=reference, prefixes=prefixes):
                measured = cell.asked.measure(view, data)
        found = measured.provenance.inputs.get("model", self.plan.models[cell.model])
        if found != self.plan.models[cell.model]:
            raise MismatchError(f"{cell.model}: its weights are {found[:12]}, the plan was made for "
                                f"{self.plan.models[cell.model][:12]}; run the command again")  # fmt: skip
        check_figures(cell, measured)
        measured.save(path_of(self.folder, cell))

    def _open(self, cell: Cell) -> ModelView:
        if self._view is None or self._name != cell.model:
            self._view = None
            view = ModelView.open(cell.model, prove=False)
            if view.digest != self.plan.models[cell.model]:
                raise MismatchError(f"{cell.model} was changed since the plan was made; run the command again")
            self._view, self._name = view, cell.model
            self._read_reference(view)
        return self._view

    def _read_reference(self, view: ModelView) -> None:
        """All places at once, for one forward over the reference instead of one a place."""
        ablations = [cell.ablation for cell in self.plan.cells.values() if cell.model == self._name]
        parts = {}
        for ablation in ablations:
            if ablation is not None and ablation.how in REFERRING:
                for part in (part for entry in ablation.of for part in parts_of(view, entry)):
                    parts[str(part.port), None if part.basis is None else id(part.basis)] = part
        reference = self.plan.references.get(self._name)
        if parts and reference is not None:
            reference.usual(view, list(parts.values()))


def check_figures(cell: Cell, measured: Measurement) -> None:
    """Raise InputError where the grid asks for a figure that the measure does not give."""
    for name in cell.asked.figures:
        if name not in measured.figures:
            raise InputError(f"{cell.asked.name} gives no figure {name!r}; it gives {', '.join(measured.figures)}")


def path_of(folder: Path, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return folder / f"{cell.key}.json"


def result(folder: Path, cell: Cell) -> Measurement | None:
    """A cell's result, or None where there is none that can be read."""
    try:
        return Measurement.load(path_of(folder, cell))
    except ArtifactError:
        return None


def run_cells(plan: Plan, folder: Path, *, jobs: int = 1) -> int:
    """Run every cell that has no result yet; returns how many were run.

    Args:
        plan: what is to be run.
        folder: where results are kept; results of other plans there are left alone.
        jobs: processes; each has a model of its own and one thread.

    Raises:
        InputError: a process died, or `jobs` is below 1.
    """
    if jobs < 1:
        raise InputError(f"jobs {jobs}: expected at least 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{folder} cannot be made: {error.strerror}; nothing was run") from error
    for leftover in folder.glob(".*.part"):
        leftover.unlink(missing_ok=True)
    wanted = list(plan.cells.values())
    pending = [cell for cell in wanted if result(folder, cell) is None]
    done = len(wanted) - len(pending)
    tell("cells", done, len(wanted), "found" if done else "")
    runs = _one_by_one(plan, folder, pending) if jobs == 1 else _side_by_side(plan, folder, pending, jobs)
    for count, _ in enumerate(runs, done + 1):
        tell("cells", count, len(wanted))
    return len(pending)


def _one_by_one(plan: Plan, folder: Path, pending: Sequence[Cell]) -> Iterator[None]:
    bench = Bench(plan, folder)
    for cell in pending:
        bench.run(cell)
        yield


def _side_by_side(plan: Plan, folder: Path, pending: Sequence[Cell], jobs: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    tasks, done = context.Queue(), context.Queue()
    # Bytes of our own: left to itself, torch would send every tensor through a file of shared memory.
    blob = pickle.dumps((plan, folder))
    workers = [context.Process(target=_work, args=(blob, tasks, done), daemon=True) for _ in range(jobs)]
    try:
        with _as_children_start():
            for worker in workers:
                worker.start()
        for cell in pending:
            tasks.put(cell.key)
        for _ in workers:
            tasks.put(None)
        for _ in pending:
            error = _next(done, workers)
            if error is not None:
                raise error if isinstance(error, Exception) else RuntimeError(error)
            yield
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        for leftover in folder.glob(".*.part"):
            leftover.unlink(missing_ok=True)


def _next(done: Any, workers: Sequence[Any]) -> Any:
    while True:
        try:
            return done.get(timeout=0.5)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                raise InputError(f"a process ended with {dead[0]} (out of memory?); finished cells are kept: run the "
                                 "same command again with fewer --jobs") from None  # fmt: skip


def _work(blob: bytes, tasks: Any, done: Any) -> None:
    """One process: takes keys until there is none."""
    import torch

    torch.set_num_threads(1)
    plan, folder = pickle.loads(blob)
    bench, cells = Bench(plan, folder), plan.cells
    while (key := tasks.get()) is not None:
        try:
            bench.run(cells[key])
            done.put(None)
        except Exception as error:
            done.put(_portable(error))


def _portable(error: Exception) -> Any:
    from memloc.errors import MemlocError

    return type(error)(*error.args) if isinstance(error, MemlocError) else traceback.format_exc()


@contextmanager
def _as_children_start() -> Iterator[None]:
    """What processes inherit: one thread each, and deaf to the keyboard from their first moment (the parent is not)."""
    before = os.environ.get("OMP_NUM_THREADS")
    main = threading.current_thread() is threading.main_thread()
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, heard)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
