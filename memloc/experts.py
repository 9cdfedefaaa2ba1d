"""A mixture of experts seen as one wide MLP: places inside its forward pass, where visitors are called.

A block of E experts of f neurons each is an MLP of E · f neurons, of which a token speaks through those of the few
experts it is sent to. With w the weight the router gives an expert (0 where the token is not sent there), a neuron is
w · act(gate) · in: so the experts' output maps put side by side, [d, E · f], times the neurons [E · f], are what the
block's MLP puts out, for every token. Nothing of this is stored by the model, which runs each expert on its own tokens;
while someone looks, the module's forward pass is taken over by `Visited`, and given back when the last has left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Inner = Literal["weights", "read", "gate", "in", "neurons", "said"]
"""A place inside: the router's weights [N, E], 0 where a token is not sent; what an expert reads [N, d]; what its gate
and its `mlp.in` put out, and its neurons, [N, f] each (of all experts [N, E · f]); and what an expert adds [N, d]. All
are 0 where the token is not sent to the expert."""

EVERY = -1
"""All experts side by side."""

Visit = Callable[[Tensor], "Tensor | None"]


@dataclass(eq=False)
class Visited:
    """The forward pass of an experts' module, with visitors.

    Gates, maps and what is read are used only where a token is sent to an expert. Neurons are inputs of a linear map
    like those of any MLP: what a visitor puts there counts, also for a token that is not sent to their expert, and so
    does its gradient.

    Attributes:
        module: with `gate_up_proj` [E, 2f, d], `down_proj` [E, d, f] (or as `names` calls them) and `_apply_gate`.
        own: its own forward pass, which gives the output wherever nothing was changed and no gradient is asked for.
        names: of the module's two parameters.
        visits: place, expert and visitor, in the order they came.
        instead: what stood in the instance where this stands now, if anything did.
    """

    module: Any
    own: Callable[..., Tensor]
    names: tuple[str, str]
    visits: list[tuple[Inner, int, Visit]] = field(default_factory=list)
    instead: Any = None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts add, [N, d]."""
        into, out = (getattr(self.module, name) for name in self.names)
        flow = _Flow(self, len(into), hidden_states, top_k_index, top_k_weights)
        made = self._neurons(flow, into)
        neurons = flow.visited("neurons", made)
        if flow.changed or neurons.requires_grad or flow.asked("said"):
            said = _said(flow, neurons, out)
            if flow.changed or neurons.requires_grad:
                return said
        return self.own(hidden_states, top_k_index, top_k_weights)

    def _neurons(self, flow: _Flow, into: Tensor) -> Tensor:
        """All experts' neurons, times the router's weights: [N, E · f]."""
        weights = flow.visited("weights", flow.scattered(flow.weights[:, None]))
        read = [flow.of(expert, "read", flow.hidden, tokens) for expert, tokens in enumerate(flow.sent)]
        both = torch.cat([linear(x, weight) for x, weight in zip(read, into, strict=True)])
        gate, passed = both.chunk(2, -1)
        if flow.asked("gate"):
            gate = flow.gathered(flow.visited("gate", flow.scattered(gate)))
        if flow.asked("in"):
            passed = flow.gathered(flow.visited("in", flow.scattered(passed)))
        neurons = self.module._apply_gate(torch.cat([gate, passed], -1))
        return flow.scattered(neurons * flow.gathered(weights).to(neurons.dtype))


class _Flow:
    """One forward pass: which token goes where."""

    def __init__(self, visited: Visited, experts: int, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self.visits, self.experts, self.hidden, self.changed = visited.visits, experts, hidden, False
        order = index.reshape(-1).argsort(stable=True)
        chosen = index.reshape(-1)[order]
        tokens = torch.div(order, index.shape[-1], rounding_mode="floor")
        self.weights = weights.reshape(-1)[order]
        self.rows = tokens * experts + chosen
        self.sent = torch.split(tokens, torch.bincount(chosen, minlength=experts).tolist())

    def asked(self, place: Inner) -> bool:
        return any(where == place for where, _, _ in self.visits)

    def scattered(self, slots: Tensor) -> Tensor:
        """A row a (token, expert) sent, as a row a token: [N, E · f], 0 elsewhere."""
        whole = slots.new_zeros(len(self.hidden) * self.experts, slots.shape[-1])
        return whole.index_copy(0, self.rows, slots).view(len(self.hidden), -1)

    def gathered(self, whole: Tensor) -> Tensor:
        """The reverse of `scattered`."""
        return whole.view(len(self.hidden) * self.experts, -1)[self.rows]

    def visited(self, place: Inner, whole: Tensor) -> Tensor:
        """`whole` [N, E · f] after everyone who asked to see all of it, or one expert's part."""
        parts: list[Tensor] | None = None
        for where, expert, visit in self.visits:
            if where != place:
                continue
            if expert == EVERY:
                whole, parts = whole if parts is None else torch.cat(parts, -1), None
                whole = self._shown(visit, whole)
            else:
                parts = list(whole.chunk(self.experts, -1)) if parts is None else parts
                parts[expert] = self._shown(visit, parts[expert])
        return whole if parts is None else torch.cat(parts, -1)

    def of(self, expert: int, place: Inner, given: Tensor, tokens: Tensor) -> Tensor:
        """Rows `tokens` of `given` [N, d], after everyone who asked to see them at this expert."""
        for where, number, visit in self.visits:
            if where == place and number == expert:
                sent = torch.zeros(len(given), 1, dtype=torch.bool, device=given.device).index_fill(0, tokens, True)
                given = self._shown(visit, torch.where(sent, given, 0))
        return given[tokens]

    def _shown(self, visit: Visit, tensor: Tensor) -> Tensor:
        found = visit(tensor)
        self.changed |= found is not None
        return tensor if found is None else found


def _said(flow: _Flow, neurons: Tensor, out: Tensor) -> Tensor:
    """What the experts add for these neurons: the wide map, expert by expert, where there is anything to map."""
    total = torch.zeros_like(flow.hidden)
    for expert, (part, weight) in enumerate(zip(neurons.chunk(flow.experts, -1), out, strict=True)):
        visits = [visit for place, number, visit in flow.visits if place == "said" and number == expert]
        # Where gradients are asked for, a neuron that is silent has one too.
        tokens = None if neurons.requires_grad or visits else part.any(-1).nonzero().reshape(-1)
        said = linear(part if tokens is None else part[tokens], weight)
        for visit in visits:
            said = flow._shown(visit, said)
        total = total + said if tokens is None else total.index_add(0, tokens, said)
    return total


@contextlib.contextmanager
def visiting(module: nn.Module, names: tuple[str, str], visits: list[tuple[Inner, int, Visit]]) -> Iterator[None]:
    """Call visitors in every forward pass of an experts' module inside the block; it is as it was afterwards.

    Args:
        module: of a mixture of experts.
        names: of its two parameters, [E, 2f, d] and [E, d, f].
        visits: place, expert (or EVERY) and what to call there; what a visitor returns takes the tensor's place, None
            leaves it.
    """
    there = module.__dict__.get("forward")
    seen = there if isinstance(there, Visited) else Visited(module, module.forward, names, instead=there)
    module.__dict__["forward"] = seen
    seen.visits.extend(visits)
    try:
        yield
    finally:
        for visit in visits:
            seen.visits.remove(visit)
        if not seen.visits:
            del module.__dict__["forward"]
            if seen.instead is not None:
                module.__dict__["forward"] = seen.instead
