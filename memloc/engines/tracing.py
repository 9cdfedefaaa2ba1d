"""nnsight: visitors are called from the body of a trace. The only file that imports nnsight."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memloc import hooks
from memloc.engines.engine import NNSIGHT, as_tokens
from memloc.errors import InputError, ModelError
from memloc.hooks import Point, Side

K = TypeVar("K")
Stop = tuple[Any, Side, Callable[[Tensor], "Tensor | None"]]
"""Where a trace stops by: an envoy, its side, and who visits."""


def is_nnsight(model: Any) -> bool:
    """Whether it is an nnsight model, found out without importing nnsight."""
    library = sys.modules.get("nnsight")
    return library is not None and isinstance(model, library.Envoy)


def unwrapped(model: Any) -> Any:
    """The transformers model that an nnsight model wraps, which nnsight leaves as it is.

    Raises:
        ModelError: it has no weights here: not loaded yet, or hosted.
    """
    module = model._module
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        raise ModelError(
            "this nnsight model has no weights here; open it with dispatch=True, or, where it is hosted, read it by "
            "memloc.engines.remote.record"
        )
    return module


def traced(model: nn.Module) -> Any:
    """An nnsight model over `model`.

    Raises:
        InputError: nnsight is not installed.
    """
    return library().NNsight(model)


def library() -> Any:
    """nnsight, imported at its first use without putting a `.save` on every object of the process.

    Where it has been imported before, it is left as it was found.

    Raises:
        InputError: it is not installed.
    """
    if "nnsight" in sys.modules:
        return sys.modules["nnsight"]
    try:
        with _unmounted():
            import nnsight
    except ImportError:
        raise InputError("the engine nnsight needs a package; pip install nnsight") from None
    return nnsight


class TraceEngine:
    """Runs an nnsight model in traces; one trace a run.

    Args:
        traced: the nnsight model.
        model: the transformers model inside, whose modules points are of.
    """

    name = NNSIGHT

    def __init__(self, traced: Any, model: nn.Module) -> None:
        self.traced = traced
        self._model = model
        self._envoys = {id(envoy._module): envoy for envoy in _all(traced)}
        self._order: dict[tuple[int, Side], int] = {}
        self._tracing = False
        self._visitors: list[tuple[Point, Callable[[Tensor], Tensor | None]]] = []

    @contextlib.contextmanager
    def visiting(self, points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]) -> Iterator[None]:
        """In the body of every trace that is run in the block.

        Raises:
            ModelError: nnsight has no envoy there, or the place is inside a module of experts.
        """
        hooks.refuse_inside(points)
        mine = [(point, _bound(visit, key)) for key, point in points.items()]
        for point, _ in mine:
            if id(point.module) not in self._envoys:
                raise ModelError(f"{type(point.module).__name__}: nnsight has no envoy there; take engine hooks")
        before = self._visitors
        self._visitors = [*before, *mine]

        def outside(key: K, tensor: Tensor) -> Tensor | None:
            return None if self._tracing else visit(key, tensor)

        try:
            # Methods also run blocks themselves, or the model from the middle: there no trace is, and hooks visit.
            with hooks.visiting(points, outside):
                yield
        finally:
            self._visitors = before

    def run(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """In one trace. What a visitor raises comes out as it was raised."""
        stops = self._stops()
        kept: dict[str, Any] = {}
        # The base is traced by itself: some families' whole model runs past its base.
        traced, tokens = self._envoys[id(module)], tuple(inputs["input_ids"].shape)
        # nnsight reads the body from this file's source and runs it beside the model: places in order of execution.
        with self._alone(), traced.trace(**inputs) as tracer:
            raised = _visit(stops, tokens)
            if raised is not None:
                kept["raised"] = raised
                tracer.stop()
            else:
                kept["result"] = traced.output
        if "raised" in kept:
            raise kept["raised"]
        return kept["result"]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        before, self._tracing = self._tracing, True
        try:
            yield
        finally:
            self._tracing = before

    def _stops(self) -> list[Stop]:
        if self._visitors and not self._order:
            self._order = self._learn()
        missing = [point for point, _ in self._visitors if (id(point.module), point.side) not in self._order]
        if missing:
            path = self._envoys[id(missing[0].module)].path
            raise ModelError(f"{path}: nothing passes there when the model runs; nnsight cannot read it")
        ranked = sorted(self._visitors, key=lambda seen: self._order[id(seen[0].module), seen[0].side])
        return [(self._envoys[id(point.module)], point.side, visit) for point, visit in ranked]

    @torch.no_grad()
    def _learn(self) -> dict[tuple[int, Side], int]:
        """In which order places are passed. nnsight must be asked in that order."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(self._model.parameters()).device)
        with self._alone(), hooks.rank_calls(list(self._model.modules())) as seen:
            self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return seen


def _visit(stops: Sequence[Stop], tokens: tuple[int, ...]) -> Exception | None:
    """Call every visitor; the first exception, which nnsight would dress up in another, is handed back."""
    for envoy, side, visit in stops:
        whole = envoy.input if side == "input" else envoy.output
        tensor = hooks.first(whole)
        shown = as_tokens(tensor, tokens)
        try:
            found = visit(shown)
        except Exception as error:
            return error
        if found is None and shown is tensor and side == "input":
            continue
        # A copy of what came out: some models go on to write over it.
        found = (shown.clone() if found is None else found).reshape(tensor.shape)
        if side == "input":
            envoy.input = found
        else:
            envoy.output = (found, *whole[1:]) if isinstance(whole, tuple) else found
    return None


def _bound(visit: Callable[[K, Tensor], Tensor | None], key: K) -> Callable[[Tensor], Tensor | None]:
    return lambda tensor: visit(key, tensor)


def _all(envoy: Any) -> Iterator[Any]:
    yield envoy
    for child in envoy._children:
        yield from _all(child)


@contextlib.contextmanager
def _unmounted() -> Iterator[None]:
    """The user's nnsight settings, but with PYMOUNT off; the environment is as before afterwards."""
    import yaml  # type: ignore[import-untyped]

    before = os.environ.get("NNSIGHT_CONFIG")
    base = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")) / "nnsight" / "config.yaml"
    own = Path(before).expanduser() if before else base.expanduser()
    settings = (yaml.safe_load(own.read_text(encoding="utf8")) if own.is_file() else None) or {}
    settings["APP"] = {**(settings.get("APP") or {}), "PYMOUNT": False}
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "config.yaml"
        changed.write_text(yaml.safe_dump(settings), encoding="utf8")
        os.environ["NNSIGHT_CONFIG"] = str(changed)
        try:
            yield
        finally:
            if before is None:
                del os.environ["NNSIGHT_CONFIG"]
            else:
                os.environ["NNSIGHT_CONFIG"] = before
