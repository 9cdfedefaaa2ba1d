"""Which layer to edit: by the relative depth that papers use, or by a measured sweep over layers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.base import Editor, Request
from memloc import progress, store
from memloc.errors import ArtifactError, InputError
from memloc.measures.facts import FactRecall
from memloc.passages import Facts
from memloc.provenance import digest_json, settings_of
from memloc.sites import Kind
from memloc.view import ModelView

GATED_DEPTH, PLAIN_DEPTH = 0.16, 0.34
"""Where ROME is applied: layer 5 of 32 in Llama-2, Llama-3, Qwen-2.5 and Mistral, whose MLPs are gated; 8 of 24, 12 of
36 and 17 of 48 in GPT-2, 15 of 44 in GPT-NeoX (and 5 of 28 in GPT-J, the exception among plain ones)."""

GATED_END, PLAIN_END = 0.25, 0.35
"""The last of MEMIT's layers: 8 of 32 in gated models, 17 of 48 in GPT-2 XL."""


def usual_layer(view: ModelView) -> int:
    """The layer at the relative depth that single edits are published for, in models of this build.

    Source: the settings of the codes of Meng et al. 2022, 2023 and of EasyEdit.
    """
    gated = Kind.MLP_GATE in view.kinds
    depth = GATED_DEPTH if gated else PLAIN_DEPTH
    return min(view.layers - 1, round(depth * view.layers))


def usual_layers(view: ModelView, count: int = 5) -> tuple[int, ...]:
    """`count` neighbouring layers that end at the relative depth batch edits are published for; fewer where it is less.

    Raises:
        InputError: a count below 1.
    """
    if count < 1:
        raise InputError(f"{count} layers to spread an edit over; expected at least 1")
    gated = Kind.MLP_GATE in view.kinds
    end = min(view.layers - 1, round((GATED_END if gated else PLAIN_END) * view.layers))
    return tuple(range(max(0, end - count + 1), end + 1))


@dataclass(frozen=True)
class Sweep:
    """What one edit a fact and layer did.

    Attributes:
        facts: their ids.
        layers: tried.
        rows: for each fact, for each layer, figure to value: "rewrite", and of `FactRecall` "efficacy accuracy",
            "paraphrase accuracy" and "neighbour accuracy", where the fact has such prompts.
    """

    facts: tuple[str, ...]
    layers: tuple[int, ...]
    rows: tuple[tuple[Mapping[str, float], ...], ...]

    def table(self, figure: str) -> list[list[float]]:
        """A row a fact, a column a layer.

        Raises:
            InputError: a fact has no such figure.
        """
        if any(figure not in cell for row in self.rows for cell in row):
            raise InputError(f"the sweep has no {figure!r} of every fact; there are {', '.join(self.figures)}")
        return [[cell[figure] for cell in row] for row in self.rows]

    @property
    def figures(self) -> tuple[str, ...]:
        """Those that every fact has."""
        return tuple(name for name in self.rows[0][0] if all(name in cell for row in self.rows for cell in row))

    def means(self, figure: str) -> dict[int, float]:
        """Mean over facts, by layer."""
        table = self.table(figure)
        return {layer: sum(row[at] for row in table) / len(table) for at, layer in enumerate(self.layers)}

    def best(self, figures: Sequence[str] = ("rewrite", "neighbour accuracy")) -> int:
        """The layer whose figures have the largest harmonic mean; the lowest one of equals.

        Figures that not every fact has are left out. Choose on facts other than those to be edited and judged.
        """
        means = [self.means(figure) for figure in figures if figure in self.figures]
        merit = {layer: _harmonic([max(0.0, found[layer]) for found in means]) for layer in self.layers}
        return max(self.layers, key=lambda layer: (merit[layer], -layer))


def sweep(
    view: ModelView,
    facts: Facts,
    editor: Any,
    request: Request,
    layers: Sequence[int] | None = None,
    *,
    folder: str | Path | None = None,
) -> Sweep:
    """Edit every fact alone at every layer, and measure; the model is as it was.

    The rewrite score is (p - p₀) / (1 - p₀), p being the probability of the whole new answer after the fact's own
    prompt with the edit and p₀ without it: 1 is perfect, 0 is no change.

    Args:
        view: the model.
        facts: to edit, one by one.
        editor: one with a field `layer`.
        request: everything else it is given; its facts are replaced.
        layers: to try; by default all.
        folder: where finished cells are kept and read again, by a digest of everything; None keeps none.

    Raises:
        InputError: no facts, or an editor whose layer cannot be named.

    Cost: an edit and two measurements a fact and layer.

    Source: the rewrite score is that of Hase et al. 2023, arXiv:2301.04213.
    """
    chosen = tuple(range(view.layers)) if layers is None else tuple(layers)
    if not dataclasses.is_dataclass(editor) or not any(item.name == "layer" for item in dataclasses.fields(editor)):
        raise InputError(f"{type(editor).__name__} has no setting `layer`, so it cannot be swept over layers")
    if not facts or not chosen:
        raise InputError(f"a sweep of {len(facts)} facts over {len(chosen)} layers; each needs at least one")
    model, grid = view.digest, [(index, layer) for index in range(len(facts)) for layer in chosen]
    before = {row["id"]: row for row in FactRecall()(view, facts).rows}
    cells: dict[tuple[int, int], Mapping[str, float]] = {}
    for index, layer in progress.steps(grid, "edits"):
        fact = facts[index : index + 1]
        made: Any = dataclasses.replace(editor, layer=layer)  # type: ignore[type-var]
        asked = dataclasses.replace(request, facts=fact)
        path = None if folder is None else Path(folder) / f"{_key(view, model, made, asked)}.json"
        found = None if path is None else _read(path)
        if found is None:
            found = _cell(view, made, asked, before[fact[0].id])
            if path is not None:
                store.write_text(path, json.dumps(found))
        cells[index, layer] = found
    rows = tuple(tuple(cells[index, layer] for layer in chosen) for index in range(len(facts)))
    return Sweep(facts.ids, chosen, rows)


def _cell(view: ModelView, editor: Editor, request: Request, before: Mapping[str, Any]) -> dict[str, float]:
    facts = request.need_facts()
    with editor(view, request).apply(view):
        row = FactRecall()(view, facts).rows[0]
    old, new = (math.exp(-entry["nll_new"] * len(facts[0].target)) for entry in (before, row))
    names = ("efficacy accuracy", "paraphrase accuracy", "neighbour accuracy")
    return {"rewrite": (new - old) / max(1 - old, 1e-12), **{name: float(row[name]) for name in names if name in row}}


def _key(view: ModelView, model: str, editor: Any, request: Request) -> str:
    """Of everything a cell depends on."""
    settings = [type(editor).__name__, settings_of(editor), request.seed, str(view.dtype)]
    return digest_json([*settings, {**request.inputs(view), "model": model}])


def _read(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or "rewrite" not in found:
        raise ArtifactError(f"{path} was not written by a sweep; remove it or name another folder")
    return found


def _harmonic(values: Sequence[float]) -> float:
    return len(values) / sum(1 / value for value in values) if values and all(values) else 0.0
