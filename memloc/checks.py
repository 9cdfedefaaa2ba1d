"""The battery every localizer must pass. Public: a guest's method can be held to it in one line.

Each check is named after what must not matter, and raises AssertionError with a sentence when it does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memloc.costs import Cost, counted
from memloc.parts import in_parts
from memloc.passages import Passage, Passages
from memloc.provenance import digest_tensor, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.truth.planted import Planted
from memloc.view import ModelView

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far two scores that should agree may be apart, as a share of the largest: scores themselves are float32."""


class Localizer(Protocol):
    """A frozen dataclass whose fields are its settings."""

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places; larger is more responsible."""
        ...

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """What a call with the same arguments takes, told without running the model."""
        ...


def check_localizer(
    localizer: Any, view: ModelView, passages: Passages, *, contrast: Passages | None = None
) -> tuple[str, ...]:
    """Hold a localizer to the whole battery.

    Args:
        localizer: an instance, with the settings to be checked.
        view: a small model; each check runs the localizer a few times.
        passages: three or more; copies of unequal lengths are cut from them.
        contrast: where the localizer needs one.

    Returns:
        The names of the checks, all passed.

    Raises:
        AssertionError: a check failed; one sentence says which and how far.
    """
    given = ragged(passages)
    for check in CHECKS:
        check(localizer, view, given, contrast)
    return tuple(check.__name__ for check in CHECKS)


def leaves_the_model_alone(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """Weights, flags, gradients, hooks, modes and random states are as they were."""
    with hands_off(view):
        localizer(view, passages, contrast=contrast)


def says_the_same_twice(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """Same inputs, same scores to the bit, whatever the global random state."""
    first = localizer(view, passages, contrast=contrast)
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        second = localizer(view, passages, contrast=contrast)
    for site in first.scores:
        _require(torch.equal(first.scores[site], second.scores[site]), f"{site}: scores differ between two runs")


def ignores_batch_size(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """One at a time, which pads nothing, or all together, padded to the longest: the same scores."""
    if not hasattr(localizer, "batch_size"):
        return
    alone = dataclasses.replace(localizer, batch_size=1)(view, passages, contrast=contrast)
    for size in (2, len(passages)):
        other = dataclasses.replace(localizer, batch_size=size)(view, passages, contrast=contrast)
        _agree(alone, other, view, f"batches of {size} instead of 1")


def ignores_company(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """Where scores have an axis of passages, a passage's scores do not depend on the others."""
    whole = localizer(view, passages, contrast=contrast)
    if whole.passages is None:
        return
    for index, name in enumerate(passages.ids):
        alone = localizer(view, passages[index : index + 1], contrast=contrast)
        _agree(whole.of(name), alone.of(name), view, f"passage {name!r} on its own")


def ignores_order(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """The order of passages changes the order of an axis of them and nothing else."""
    forth = localizer(view, passages, contrast=contrast)
    back = localizer(view, passages[::-1], contrast=contrast)
    _agree(forth.mean(), back.mean(), view, "passages in reverse order")
    if forth.passages is not None:
        _require(back.passages == forth.passages[::-1], "the axis of passages does not follow their order")
        for name in forth.passages:
            _agree(forth.of(name), back.of(name), view, f"passage {name!r} in reverse order")


def scores_real_places(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """Sites exist in the model, scores have the shape of their grain, and there is something to choose from."""
    found = localizer(view, passages, contrast=contrast)
    _require(bool(found.scores), "no site is scored")
    for site, scores in found.mean().scores.items():
        _require(view.has(site), f"{site} is scored, but the model has no such place")
        expected = shape_of(view, site, found.grain)
        fits = expected is None or tuple(scores.shape) == expected
        _require(fits, f"{site}: scores {list(scores.shape)}, {found.grain}s need {list(expected or ())}")
    _require(found.passages in (None, passages.ids), f"axis of passages {found.passages}, given {passages.ids}")
    spread = torch.cat([scores.reshape(-1) for scores in found.mean().scores.values()])
    _require(bool(spread.min() < spread.max()), "all scores are the same, so nothing is located")


def survives_the_disk(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """Saved and loaded, a localization is what it was."""
    found = localizer(view, passages, contrast=contrast)
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder) / "localization.safetensors")
        loaded = Localization.load(Path(folder) / "localization.safetensors")
    _require(set(found.scores) == set(loaded.scores), "sites differ after saving and loading")
    same = all(torch.equal(found.scores[site], loaded.scores[site]) for site in found.scores)
    _require(same, "scores differ after saving and loading")
    rest = [(entry.grain, entry.passages, dict(entry.notes), entry.provenance.to_json()) for entry in (found, loaded)]
    _require(rest[0] == rest[1], "grain, passages, notes or provenance differ after saving and loading")


def says_where_it_comes_from(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """Provenance holds the settings and the digests of model and passages."""
    made = localizer(view, passages, contrast=contrast).provenance
    _require(bool(made.method), "provenance has no method name")
    _require(dict(made.settings) == settings_of(localizer), "provenance has other settings than the localizer")
    _require(made.inputs.get("model") == view.digest, "provenance has no digest of the model, or another's")
    _require(made.inputs.get("passages") == passages.digest, "provenance has no digest of the passages, or of others")


def goes_on_in_parts(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """Run in parts, with one found from a run that was cut short, a method says what it says at once."""
    if not getattr(localizer, "in_parts", False):
        return
    whole = localizer(view, passages, contrast=contrast)
    with tempfile.TemporaryDirectory() as folder:
        first = in_parts(localizer, view, passages, folder, contrast=contrast, size=2)
        sorted(Path(folder).glob("*/part-*"))[-1].unlink()
        again = in_parts(localizer, view, passages, folder, contrast=contrast, size=2)
    for found, what in ((first, "in parts of 2"), (again, "one part read, one run again")):
        _agree(whole, found, view, what)
        _require(found.passages == whole.passages and found.lengths == whole.lengths, f"{what}: other passages")
        _require(found.notes.keys() == whole.notes.keys(), f"{what}: other notes")


def costs_what_it_says(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None) -> None:
    """What `cost` foretells is what a run takes, within the bound it names; memory stays within the plan."""
    if not hasattr(localizer, "cost"):
        return
    said: Cost = localizer.cost(view, passages, contrast=contrast)
    with counted(view) as spent:
        localizer(view, passages, contrast=contrast)
    for way in ("forward", "backward"):
        foretold, taken = getattr(said, way), getattr(spent, way)
        fits = {"exact": taken == foretold, "at most": taken <= foretold, "at least": taken >= foretold}[said.bound]
        _require(fits, f"{way}: {said.bound} {foretold} block-tokens foretold, {taken} run")
    _require(spent.bytes <= said.bytes, f"{said.bytes} bytes of working memory foretold, {spent.bytes} taken")


CHECKS: tuple[Callable[[Any, ModelView, Passages, Passages | None], None], ...] = (
    leaves_the_model_alone,
    says_the_same_twice,
    ignores_batch_size,
    ignores_company,
    ignores_order,
    scores_real_places,
    survives_the_disk,
    says_where_it_comes_from,
    goes_on_in_parts,
    costs_what_it_says,
)
"""The battery, in order."""


def finds_the_planted_neuron(localizer: Any, planted: Planted) -> None:
    """Larger is more responsible: the best-scored place is, or holds, the neuron that was planted.

    Not part of `check_localizer`: a control must not find it.

    Raises:
        AssertionError: another place scores higher.
    """
    found = localizer(planted.view, planted.passages, contrast=planted.controls)
    ((site, (index,)),) = found.top(1).indices().items()
    shape = found.mean().scores[site].shape
    if found.grain is Grain.WEIGHT:
        row, column = divmod(index, shape[1])
        hit = (column if site.kind is Kind.MLP_OUT else row) == planted.neuron
    else:
        hit = found.grain is not Grain.NEURON or index == planted.neuron
    hit = hit and site.layer == planted.site.layer and str(site.kind).startswith("mlp")
    _require(hit, f"top score at {site}[{index}], but neuron {planted.neuron} of {planted.site} was planted")


@contextlib.contextmanager
def hands_off(view: ModelView) -> Iterator[None]:
    """What happens inside must leave the model, and the process's random states, as they were.

    Raises:
        AssertionError: names what changed.
    """
    before = _state(view)
    yield
    after = _state(view)
    for what, value in before.items():
        _require(after[what] == value, f"{what} changed")


def ragged(passages: Passages) -> Passages:
    """Passages cut to unequal lengths: the front of prefixes by up to 2 tokens, the end of suffixes by up to 1."""
    items: list[Passage] = []
    for index, item in enumerate(passages):
        prefix = item.prefix[min(index % 3, len(item.prefix) - 1) :]
        suffix = item.suffix[: max(1, len(item.suffix) - index % 2)]
        items.append(dataclasses.replace(item, prefix=prefix, suffix=suffix))
    return Passages(tuple(items), passages.origin)


def shape_of(view: ModelView, site: Site, grain: Grain) -> tuple[int, ...] | None:
    """Shape of a site's scores, or None for grains whose size the model does not fix (positions, directions)."""
    if grain in (Grain.LAYER, Grain.COMPONENT):
        return ()
    if grain is Grain.WEIGHT:
        return tuple(view.weight(site).shape)
    return {Grain.NEURON: (view.neurons,), Grain.HEAD: (view.heads,)}.get(grain)


def _state(view: ModelView) -> dict[str, Any]:
    parameters = dict(view.model.named_parameters())
    modules = dict(view.model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "a module": {name: id(entry) for name, entry in modules.items()},
        "a parameter object": {name: id(entry) for name, entry in parameters.items()},
        "the weights": {name: digest_tensor(entry) for name, entry in parameters.items()},
        "a buffer": {name: digest_tensor(entry) for name, entry in view.model.named_buffers()},
        "a requires_grad flag": {name: entry.requires_grad for name, entry in parameters.items()},
        "a gradient": {name: _digest(entry.grad) for name, entry in parameters.items()},
        "a hook": {name: [len(getattr(entry, kind)) for kind in hooks] for name, entry in modules.items()},
        "training mode": {name: entry.training for name, entry in modules.items()},
        "torch's random state": digest_tensor(torch.random.get_rng_state()),
        "Python's random state": random.getstate(),
        "whether gradients are on": torch.is_grad_enabled(),
    }


def _digest(tensor: Tensor | None) -> str | None:
    return None if tensor is None else digest_tensor(tensor)


def _agree(one: Localization, other: Localization, view: ModelView, what: str) -> None:
    _require(one.scores.keys() == other.scores.keys(), f"{what}: other sites are scored")
    largest = max(float(scores.abs().max()) for scores in one.scores.values())
    allowed = TOLERANCE.get(view.dtype, 1e-3) * largest
    for site in one.scores:
        gap = float((one.scores[site] - other.scores[site]).abs().max())
        _require(gap <= allowed, f"{what}: {site} differs by {gap:.2g} of a largest score {largest:.2g}")


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)
