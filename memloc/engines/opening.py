"""From whatever a user hands over to a plain transformers model and the engine that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memloc.engines import lens, tracing
from memloc.engines.engine import HOOKS, NNSIGHT, Engine, PlainHooks, check_name
from memloc.engines.lens import BridgeEngine
from memloc.engines.tracing import TraceEngine


@dataclass(frozen=True)
class Opened:
    """A plain model and what came with it.

    Attributes:
        model: a transformers model with its own names and layout, holding the very parameters handed over.
        tokenizer: what the wrapper carried, or None.
        engine: what runs it.
        bridge: the TransformerBridge handed over, or None.
    """

    model: Any
    tokenizer: Any
    engine: Engine
    bridge: Any = None


def open_engine(given: Any, engine: str = HOOKS) -> Opened:
    """Unwrap `given`, a transformers model, an nnsight model or a TransformerBridge, and make its engine.

    No weight is copied, but the splits of fused maps that a bridge makes. Neither the user's model nor its wrapper is
    changed.

    Raises:
        InputError: no such engine, or its package is missing.
        ModelError: a bridge with processed weights, an nnsight model without weights, no adapter.
    """
    check_name(engine)
    model, bridge, traced = given, None, None
    if lens.is_bridge(given):
        model, bridge = lens.unwrapped(given), given
    elif tracing.is_nnsight(given):
        model, traced = tracing.unwrapped(given), given
    tokenizer = None if model is given else getattr(given, "tokenizer", None)
    made: Engine = PlainHooks()
    if engine == NNSIGHT:
        made = TraceEngine(traced if traced is not None else tracing.traced(model), model)
    elif engine != HOOKS:
        made = BridgeEngine(bridge if bridge is not None else lens.bridged(model), model)
    return Opened(model, tokenizer, made, bridge)
