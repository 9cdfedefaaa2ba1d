"""The grid: which models, data, measures and ablations; read from a TOML file and checked key by key.

```toml
model = "{lab}"                                 # or models = ["a", "b"]; {NAME}s are filled in by --with NAME=VALUE

[reference]                                     # ordinary text: means, spreads and substitutes come from it
text = "{lab}/corpus.jsonl#split=train"
limit = 64                                      # windows of it
tokens = 256                                    # whole tokens kept for resampling

[data.recited]
passages = "{lab}/passages.jsonl#dose=64"       # or text = FILE, or facts = FILE
limit = 20                                      # the first so many

[[measure]]
name = "extraction"                             # any measure; other keys are its settings
data = "recited"
figures = ["strict rate", "mean nll"]           # by default all it gives; the first is plotted

[[ablate]]
name = "heads"
every = "head"                                  # or "layer", "component", "neuron": each place alone
# components = ["L0.attn", "L1H2", "L1N17"]     # or these, together; with `each = true`, one by one
# windows = [1, 2]                              # or runs of so many consecutive layers
# localization = "where.safetensors"            # or the best places of a localization,
# counts = [1, 10, 100]                         #    so many of them (or fractions = [0.01])
# directions = "directions.safetensors"         # or tensors [rows, width], called L3 (residual) or L3.mlp.out
how = ["zero", "mean"]
factors = [0.5, 2.0]                            # of scale and noise
seeds = [0, 1]                                  # of resample and noise
positions = "all"                               # "prefix", "suffix", or [0, 1]
controls = 2                                    # random twins of each set, of equal size; 1 by default
matched = "site"                                # as many at every site, or in the whole "model"
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memloc.ablations.ablation import FACTORS, HOWS
from memloc.errors import InputError
from memloc.flags import DataFile
from memloc.grids.reading import Table, read_toml
from memloc.methods import MEASURES

KINDS = ("passages", "text", "facts")
GRAINS = ("layer", "component", "head", "neuron")
SOURCES = ("components", "every", "windows", "localization", "directions")


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data file, and how much of it.

    Attributes:
        kind: "passages", "text" or "facts".
        file: the file, with its filter.
        limit: the first so many records (windows, for text), or None for all.
        prefix: tokens of a text record that make its prefix.
        suffix: tokens after it that make its suffix.
    """

    kind: str
    file: DataFile
    limit: int | None = None
    prefix: int = 50
    suffix: int = 50


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A measure and what it is asked of.

    Attributes:
        name: the measure's name in its table.
        measure: an instance, with its settings.
        data: name of the data.
        figures: those that go into the table; all where there are none. The first is plotted.
    """

    name: str
    measure: Any
    data: str
    figures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Sets of components and what is done to them: one [[ablate]].

    Attributes:
        name: what it is called in the table.
        source: which key names the components.
        value: what it says.
        each: every named component alone.
        counts: how many of a localization's best places.
        fractions: or which share of them.
        per: the best of the whole "model", or at every "site".
        how: what is done.
        factors: of scale and noise; where empty, their defaults.
        seeds: of resample and noise.
        positions: at which tokens.
        controls: random twins of each set.
        matched: as many places at every "site" or in the whole "model"; "grain": whichever the grain allows.
    """

    name: str
    source: str
    value: Any
    each: bool = False
    counts: tuple[int, ...] = ()
    fractions: tuple[float, ...] = ()
    per: str = "model"
    how: tuple[str, ...] = ("zero",)
    factors: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    positions: Any = "all"
    controls: int = 1
    matched: str = "grain"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Everything that is to be run. Read one with `Grid.read`, or write one in Python.

    Attributes:
        models: checkpoint folders or hub names.
        data: name to data.
        measures: what is measured.
        sets: what is ablated.
        reference: ordinary text for mean, resample and noise, or None.
        reference_tokens: whole tokens of it that are kept for resampling.
    """

    models: tuple[str, ...]
    data: Mapping[str, Data]
    measures: tuple[Asked, ...]
    sets: tuple[Sets, ...]
    reference: Data | None = None
    reference_tokens: int = 256

    @classmethod
    def read(cls, path: str | Path, **values: str) -> Grid:
        """The grid of a TOML file. Relative files are looked for beside it.

        Args:
            path: the file.
            values: what {NAME} stands for in its texts.

        Raises:
            InputError: not a TOML file, or a key that cannot be used; the file, the key, what was found and what was
                expected are named.
        """
        path = Path(path)
        return cls.of(read_toml(path, values), folder=path.parent, where=path.name)

    @classmethod
    def of(cls, content: Mapping[str, Any], *, folder: str | Path = ".", where: str = "grid") -> Grid:
        """The grid of what a TOML file holds.

        Args:
            content: its tables.
            folder: where relative files are looked for.
            where: what messages call it.

        Raises:
            InputError: as `read`.
        """
        table, folder = Table(where, content), Path(folder)
        if table.has("model") == table.has("models"):
            raise table.wrong("model", None if not table.has("model") else "model and models", "one of the two")
        names = (table.take("model", "text"),) if table.has("model") else table.take("models", "list of text")
        data = {name: _data(entry, folder) for name, entry in table.named("data").items()}
        reference, tokens = _reference(table, folder)
        measures = tuple(_asked(entry, data) for entry in table.tables("measure"))
        sets = tuple(_sets(entry, folder) for entry in table.tables("ablate"))
        table.done()
        for number, entry in enumerate(sets):
            if entry.name in {other.name for other in sets[:number]}:
                raise InputError(f"{where}: ablate[{number}]: name: {entry.name!r} twice; expected another name")
            if reference is None and set(entry.how) & {"mean", "resample", "noise"}:
                raise InputError(f"{where}: reference: missing; expected a text file, for {', '.join(entry.how)} "
                                 f"in ablate[{number}]")  # fmt: skip
        models = tuple(str(folder / name) if (folder / name).exists() else name for name in names)
        return cls(models=models, data=data, measures=measures, sets=sets, reference=reference, reference_tokens=tokens)


def _file(table: Table, key: str, folder: Path) -> DataFile:
    file = DataFile.parse(str(folder / table.take(key, "text", needed=True)))
    if not file.path.is_file():
        raise table.wrong(key, str(file.path), "a file that is there")
    return file


def _least(table: Table, key: str, least: int, default: int | None) -> Any:
    found = table.take(key, "whole number", default)
    if found is not None and found < least:
        raise table.wrong(key, found, f"at least {least}")
    return found


def _data(table: Table, folder: Path) -> Data:
    given = [kind for kind in KINDS if table.has(kind)]
    if len(given) != 1:
        raise table.wrong("passages", " and ".join(given) or None, "one of passages, text and facts")
    found = Data(
        kind=given[0],
        file=_file(table, given[0], folder),
        limit=_least(table, "limit", 1, None),
        prefix=_least(table, "prefix", 1, 50),
        suffix=_least(table, "suffix", 1, 50),
    )
    table.done()
    return found


def _reference(table: Table, folder: Path) -> tuple[Data | None, int]:
    if not table.has("reference"):
        return None, 256
    inner = Table(f"{table.where}: reference", table.take("reference", "table"))
    tokens = _least(inner, "tokens", 1, 256)
    if inner.has("facts"):
        raise inner.wrong("facts", "facts", "text or passages")
    return _data(inner, folder), tokens


def _asked(table: Table, data: Mapping[str, Data]) -> Asked:
    name = table.choice("name", sorted(MEASURES))
    asked_of = table.choice("data", list(data), next(iter(data)) if len(data) == 1 else None)
    figures = table.take("figures", "list of text", ())
    facts = "facts" in MEASURES[name].__call__.__annotations__
    if facts != (data[asked_of].kind == "facts"):
        raise table.wrong("data", asked_of, f"{'facts' if facts else 'passages or text'}, which {name} is measured on")
    return Asked(name=name, measure=table.build(MEASURES[name]), data=asked_of, figures=figures)


def _sets(table: Table, folder: Path) -> Sets:
    given = [source for source in SOURCES if table.has(source)]
    if len(given) != 1:
        raise table.wrong("components", " and ".join(given) or None, f"one of {', '.join(SOURCES)}")
    source = given[0]
    value, settings = _value(table, source, folder)
    how = table.choice("how", HOWS, "zero", many=True)
    factors = table.take("factors", "list of number", ())
    if factors and not set(how) & set(FACTORS):
        raise table.wrong("factors", list(factors), f"{' or '.join(FACTORS)} among how")
    found = Sets(
        name=table.take("name", "text", source),
        source=source,
        value=value,
        how=how,
        factors=tuple(float(entry) for entry in factors),
        seeds=table.take("seeds", "list of whole number", (0,)),
        positions=_positions(table),
        controls=_least(table, "controls", 0, 1),
        matched=table.choice("matched", ("site", "model", "grain"), "grain"),
        **settings,
    )
    table.done()
    return found


def _value(table: Table, source: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    if source == "components":
        return table.take(source, "list of text"), {"each": table.take("each", "true or false", False)}
    if source == "every":
        return table.choice(source, GRAINS), {"each": True}
    if source == "windows":
        return table.take(source, "list of whole number"), {}
    file = _file(table, source, folder).path
    if source == "directions":
        return file, {"each": table.take("each", "true or false", False)}
    counts = table.take("counts", "list of whole number", ())
    fractions = tuple(float(entry) for entry in table.take("fractions", "list of number", ()))
    if bool(counts) == bool(fractions):
        raise table.wrong("counts", "counts and fractions" if counts else None, "one of counts and fractions")
    return file, {"counts": counts, "fractions": fractions, "per": table.choice("per", ("model", "site"), "model")}


def _positions(table: Table) -> Any:
    if not table.lists("positions"):
        return table.choice("positions", ("all", "prefix", "suffix"), "all")
    found = table.take("positions", "list of whole number")
    if min(found) < 0:
        raise table.wrong("positions", list(found), "numbers from 0, the row's first token")
    return found
