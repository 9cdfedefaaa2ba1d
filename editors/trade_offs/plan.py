"""What is swept: localizers, editors, budgets, seeds and data, read from a TOML file and checked key by key.

```toml
model = "{lab}"

[data]                                          # FILE#key=value takes only those records
targets = "{lab}/passages.jsonl#dose=64"
targets_limit = 10                              # the first so many
retain = "keep.jsonl"                           # named to the editors, and judged
text = "kept.txt"                               # ordinary text the editors may see
held_out = "unseen.txt"                         # text they may not: perplexity
controls = "{lab}/controls.jsonl"               # never trained on: contrast of localizers, floor of the targets
[data.memorized]                                # judged and named to nobody
others = "{lab}/passages.jsonl#dose=32"

[[localize]]
name = "weight-gradient"                        # any localizer; other keys are its settings
grain = "weight"
[[localize]]
label = "by neuron"                             # what it is called in the table; by default its name
file = "neurons.safetensors"                    # a localization that is there already

[[edit]]
name = "neuron-dropout"                         # any editor; other keys are its settings
[[edit]]
name = "svd"
alone = true                                    # chooses its places itself: once, without localizers and budgets

[budgets]
shares = [0.001, 0.01, 0.1]                     # of the model's weights
seeds = [0]
controls = 1                                    # random selections of equal size for each
magnitude = true                                # and the largest weights (or units) in their place
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editors.methods import EDITORS
from memloc.errors import InputError
from memloc.flags import DataFile
from memloc.grids.reading import Table, read_toml
from memloc.methods import LOCALIZERS
from memloc.provenance import digest_json, settings_of

OWN, RANDOM, LARGEST = "own", "random", "magnitude"


@dataclass(frozen=True)
class Where:
    """A localizer, or a localization that is there already."""

    label: str
    method: Any = None
    file: Path | None = None


@dataclass(frozen=True)
class How:
    """An editor; `alone`: it chooses its places itself."""

    label: str
    name: str
    method: Any
    alone: bool = False


@dataclass(frozen=True)
class Cell:
    """One edit to be made and judged.

    Attributes:
        where: label of the localizer; "" for an editor alone.
        how: label of the editor.
        budget: share of the weights; None for an editor alone.
        seed: of the edit.
        control: "own", "random" or "magnitude".
        draw: which random selection.
    """

    where: str
    how: str
    budget: float | None
    seed: int
    control: str = OWN
    draw: int = 0

    @property
    def line(self) -> tuple[str, str, str]:
        """Which curve it belongs to."""
        return self.where, self.how, self.control


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is to be swept. Read one with `Plan.read`, or write one in Python.

    Attributes:
        model: checkpoint folder or hub name.
        files: name to file: targets, and any of retain, text, held_out, controls, facts.
        memorized: name to file of what no editor is told of.
        limit: the first so many targets.
        cut: tokens of a text record that make its prefix, and its suffix.
        where: localizers.
        how: editors.
        budgets: shares of the weights.
        seeds: of the edits.
        controls: random selections for each.
        magnitude: whether the largest weights or units are tried as well.
    """

    model: str
    files: Mapping[str, DataFile]
    where: tuple[Where, ...]
    how: tuple[How, ...]
    budgets: tuple[float, ...]
    memorized: Mapping[str, DataFile] = field(default_factory=dict)
    limit: int | None = None
    cut: tuple[int, int] = (50, 50)
    seeds: tuple[int, ...] = (0,)
    controls: int = 1
    magnitude: bool = True

    def __post_init__(self) -> None:
        labels = [entry.label for entry in self.where] + [entry.label for entry in self.how]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(f"two methods are called {label!r}; give one of them another label")
        if not self.how or (not self.where and not all(entry.alone for entry in self.how)):
            raise InputError("expected at least one [[edit]], and a [[localize]] for those that are not alone")
        for share in self.budgets:
            if not 0 < share <= 1:
                raise InputError(f"budget {share}: expected a share of the weights above 0 and at most 1")
        if not self.budgets and not all(entry.alone for entry in self.how):
            raise InputError("expected budgets.shares, such as [0.001, 0.01, 0.1]")

    def cells(self) -> tuple[Cell, ...]:
        """Every edit, in the order of the table."""
        found = [Cell("", how.label, None, seed) for how in self.how if how.alone for seed in self.seeds]
        for how in (entry for entry in self.how if not entry.alone):
            for where in self.where:
                for budget in self.budgets:
                    for seed in self.seeds:
                        at = (where.label, how.label, budget, seed)
                        found.append(Cell(*at))
                        found += [Cell(*at, RANDOM, draw) for draw in range(self.controls)]
                        found += [Cell(*at, LARGEST)] if self.magnitude else []
        return tuple(found)

    def key(self, cell: Cell, digests: Mapping[str, str]) -> str:
        """What the result of `cell` is filed under: its settings, those of its methods, and the data's digests."""
        where = next((entry for entry in self.where if entry.label == cell.where), None)
        how = next(entry for entry in self.how if entry.label == cell.how)
        by = None if where is None or where.method is None else [type(where.method).__name__, settings_of(where.method)]
        found = {
            "where": None if where is None else [str(where.file), by],
            "how": [how.name, settings_of(how.method)],
            "cell": [cell.budget, cell.seed, cell.control, cell.draw],
            "data": dict(digests),
        }
        return digest_json(found)[:20]

    @classmethod
    def read(cls, path: str | Path, **values: str) -> Plan:
        """The plan of a TOML file. Relative files are looked for beside it.

        Args:
            path: the file.
            values: what {NAME} stands for in its texts.

        Raises:
            InputError: not a TOML file, or a key that cannot be used; the file, the key, what was found and what was
                expected are named.
        """
        path = Path(path)
        table = Table(path.name, read_toml(path, values))
        try:
            return _plan(table, path.parent)
        except InputError as error:
            raise error if str(error).startswith(path.name) else InputError(f"{path.name}: {error}") from error


FILES = ("targets", "retain", "text", "held_out", "controls", "facts")


def _plan(table: Table, folder: Path) -> Plan:
    model = table.take("model", "text", needed=True)
    data = Table(f"{table.where}: data", table.take("data", "table", needed=True))
    files = {name: _file(data, name, folder) for name in FILES if name == "targets" or data.has(name)}
    memorized = {}
    if data.has("memorized"):
        inner = Table(f"{data.where}.memorized", data.take("memorized", "table"))
        memorized = {name: _file(inner, name, folder) for name in inner.keys}
    limit = data.take("targets_limit", "whole number")
    cut = (data.take("prefix", "whole number", 50), data.take("suffix", "whole number", 50))
    data.done()
    where = tuple(_where(entry, folder) for entry in table.tables("localize", needed=False))
    how = tuple(_how(entry) for entry in table.tables("edit"))
    budgets = Table(f"{table.where}: budgets", table.take("budgets", "table", {}))
    table.done()
    found = Plan(
        model=str(folder / model) if (folder / model).exists() else model,
        files=files,
        memorized=memorized,
        limit=limit,
        cut=cut,
        where=where,
        how=how,
        budgets=tuple(float(share) for share in budgets.take("shares", "list of number", ())),
        seeds=budgets.take("seeds", "list of whole number", (0,)),
        controls=budgets.take("controls", "whole number", 1),
        magnitude=budgets.take("magnitude", "true or false", True),
    )
    budgets.done()
    return found


def _file(table: Table, key: str, folder: Path) -> DataFile:
    file = DataFile.parse(str(folder / table.take(key, "text", needed=True)))
    if not file.path.is_file():
        raise table.wrong(key, str(file.path), "a file that is there")
    return file


def _where(table: Table, folder: Path) -> Where:
    label = table.take("label", "text")
    if table.has("file"):
        file = _file(table, "file", folder).path
        table.done()
        return Where(label or file.stem, file=file)
    name = table.choice("name", sorted(LOCALIZERS))
    return Where(label or name, method=table.build(LOCALIZERS[name]))


def _how(table: Table) -> How:
    label, alone = table.take("label", "text"), table.take("alone", "true or false", False)
    name = table.choice("name", sorted(EDITORS))
    return How(label or name, name, table.build(EDITORS[name]), alone)
