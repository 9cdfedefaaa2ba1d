"""Scripted ablations: what a grid may say, and a run that may be interrupted, split or repeated."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import pickle
import queue
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editors.cli import main
from memloc.ablations.ablation import Ablation
from memloc.ablations.components import named, parts_of
from memloc.checks import hands_off
from memloc.costs import counted
from memloc.errors import ArtifactError, InputError, MemlocError, MismatchError
from memloc.grids import work
from memloc.grids.cells import Plan, folder_of
from memloc.grids.grid import Grid
from memloc.grids.plots import draw
from memloc.grids.run import missing, sweep
from memloc.grids.table import COLUMNS, Row, read_csv, table_of, write_csv, write_parquet
from memloc.localizers.activation import Activation
from memloc.measures.extraction import Extraction
from memloc.passages import Passages
from memloc.progress import listening
from memloc.view import ModelView

pytestmark = pytest.mark.lab
SCRIPTS = Path(__file__).parents[2] / "scripts" / "ablations"


def content(lab: Path, **changes):
    """A small grid, as a TOML file would give it."""
    return {
        "model": str(lab),
        "reference": {"text": f"{lab}/corpus.jsonl#split=train", "limit": 8, "tokens": 32},
        "data": {
            "recited": {"passages": f"{lab}/passages.jsonl#dose=96", "limit": 5},
            "facts": {"facts": f"{lab}/facts.jsonl", "limit": 2},
        },
        "measure": [
            {"name": "extraction", "data": "recited", "figures": ["exact memorization", "mean nll"], "batch_size": 4},
            {"name": "facts", "data": "facts", "figures": ["true accuracy"]},
        ],
        "ablate": [
            {"name": "heads", "every": "head", "how": ["zero", "resample"], "seeds": [0, 1], "controls": 0},
            {"name": "some", "components": ["L0.attn", "L1N3", "L1N4"], "how": "scale", "factors": [0.5, 3.0]},
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def plan(tiny_lab) -> Plan:
    return Plan.of(Grid.of(content(tiny_lab)))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory) -> Path:
    """The small grid, run through once."""
    out = tmp_path_factory.mktemp("whole")
    sweep(plan, out, plots=False)
    return out


def test_a_row_is_what_the_measure_says_under_the_ablation(tiny_lab, plan, whole):
    """One by hand: the same figures, and the baseline beside them."""
    rows = read_csv(whole / "table.csv")
    view = ModelView.open(tiny_lab)
    data = plan.data[str(tiny_lab), "recited"]
    with hands_off(view), Ablation(of=named(view, ["L0.attn", "L1N3", "L1N4"]), how="scale", factor=3.0).applied(view):
        expected = Extraction(batch_size=4)(view, data)
    plain = Extraction(batch_size=4)(view, data)
    found = [row for row in rows if row.set == "some" and row.factor == 3.0 and not row.control]
    for name in ("exact memorization", "mean nll"):
        row = next(row for row in found if row.figure == name)
        assert row.value == expected[name] and row.baseline == plain[name]
        assert math.isclose(row.difference, expected[name] - plain[name], abs_tol=1e-12)
        assert row.difference_low <= row.difference <= row.difference_high
        assert (row.low, row.high, row.n) == (expected.figures[name].low, expected.figures[name].high, 5)
    assert any(row.value != row.baseline for row in found)


def test_every_set_has_its_random_twins_of_equal_size(plan):
    twins = [line for line in plan.lines if line.sets == "some" and line.control]
    assert {line.control for line in twins} == {1} and len(twins) == 4
    for line in twins:
        own = next(other for other in plan.lines if other.sets == "some" and not other.control)
        assert line.cell.ablation.names != own.cell.ablation.names
        assert [entry.count for entry in line.cell.ablation.of] == [entry.count for entry in own.cell.ablation.of]
        assert "N" in line.cell.ablation.names[-1] and line.cell.ablation.names[-1].startswith("L1")


def test_the_table_is_tidy_and_whole(plan, whole):
    rows = read_csv(whole / "table.csv")
    # 2 + 1 figures; baseline, 4 heads × (zero, two seeds of resample), 2 factors × (set, twin)
    assert len(rows) == 3 * (1 + 4 * 3 + 2 * 2)
    assert {(row.how, row.seed) for row in rows if row.set == "heads"} == {
        ("zero", None),
        ("resample", 0),
        ("resample", 1),
    }
    assert {row.factor for row in rows if row.set == "some"} == {0.5, 3.0}
    assert all(row.difference is None for row in rows if not row.set)
    keys = [(r.set, r.label, r.control, r.how, r.factor, r.seed, r.measure, r.figure) for r in rows]
    assert len(set(keys)) == len(keys)
    write_csv(whole / "again.csv", rows)
    assert (whole / "again.csv").read_bytes() == (whole / "table.csv").read_bytes()
    with (whole / "table.csv").open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(plan, whole, tmp_path, monkeypatch):
    done: list[str] = []
    run = work.Bench.run

    def stops(self, cell):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(cell.key)
        run(self, cell)

    with monkeypatch.context() as patch:
        patch.setattr(work.Bench, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            sweep(plan, tmp_path, plots=False)
    assert len(missing(plan, tmp_path)) == len(plan.cells) - 7 and not (tmp_path / "table.csv").exists()
    with pytest.raises(ArtifactError, match="the cell has no result; run the command again"):
        table_of(plan, folder_of(tmp_path))
    again: list[str] = []
    monkeypatch.setattr(work.Bench, "run", lambda self, cell: (again.append(cell.key), run(self, cell)))
    sweep(plan, tmp_path, plots=False)
    assert len(again) == len(plan.cells) - 7 and not set(again) & set(done)
    assert (tmp_path / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()


def test_a_result_that_was_cut_is_computed_anew(plan, whole, tmp_path):
    cells = folder_of(tmp_path)
    cells.mkdir()
    for path in folder_of(whole).iterdir():
        (cells / path.name).write_bytes(path.read_bytes())
    broken = sorted(cells.iterdir())[3]
    broken.write_text(broken.read_text()[:100])
    (cells / ".x.json.abc.part").write_text("left by a kill")
    assert missing(plan, tmp_path) == [broken.stem]
    sweep(plan, tmp_path, plots=False)
    assert (tmp_path / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert not list(cells.glob(".*"))


def test_two_processes_give_what_one_gives_and_end_with_the_run(plan, whole, tmp_path):
    """Interrupted near the end: nobody is left behind, nothing is half written, and one process finishes the rest."""
    heard: list[int] = []

    def listener(label, done, total, note):
        if label == "cells":
            heard.append(done)
            if done == total - 4:
                raise KeyboardInterrupt

    with listening(listener), pytest.raises(KeyboardInterrupt):
        sweep(plan, tmp_path, jobs=2, plots=False)
    assert heard == list(range(len(plan.cells) - 3)) and not multiprocessing.active_children()
    assert 0 < len(missing(plan, tmp_path)) <= 4 and not list(folder_of(tmp_path).glob(".*"))
    sweep(plan, tmp_path, plots=False)
    assert (tmp_path / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()


def test_an_error_in_a_process_reaches_the_run(plan, tmp_path):
    """The worker's own loop, on queues of this process: it reports, and goes on to the next cell."""
    wrong = replace(plan, models=dict.fromkeys(plan.models, "0" * 64))
    tasks, done = queue.Queue(), queue.Queue()
    for key in (*list(plan.cells)[:2], "nothing", None):
        tasks.put(key)
    work._work(pickle.dumps((wrong, tmp_path)), tasks, done)
    errors = [done.get_nowait() for _ in range(3)]
    assert all(isinstance(error, MismatchError) and "changed since the plan" in str(error) for error in errors[:2])
    assert isinstance(errors[2], str) and "KeyError: 'nothing'" in errors[2]
    with pytest.raises(MismatchError, match="was changed since the plan was made"):
        sweep(wrong, tmp_path)
    with pytest.raises(InputError, match="jobs 0: expected at least 1"):
        sweep(plan, tmp_path, jobs=0)


def test_a_process_that_dies_is_noticed():
    class Dead:
        exitcode = -9

    with pytest.raises(InputError, match=r"a process ended with -9 .*run the same command again with fewer --jobs"):
        work._next(queue.Queue(), [Dead()])


def test_what_a_cell_depends_on_is_in_its_key_and_nothing_else(tiny_lab, plan):
    def keys(**changes):
        return set(Plan.of(Grid.of(content(tiny_lab, **changes))).cells)

    base, sets, measures = set(plan.cells), content(tiny_lab)["ablate"], content(tiny_lab)["measure"]
    assert keys() == base
    assert keys(ablate=[{**entry, "name": f"x{entry['name']}"} for entry in sets]) == base
    assert keys(ablate=sets[:1]) < base
    data = content(tiny_lab)["data"]
    fewer = keys(data={**data, "recited": {**data["recited"], "limit": 4}})
    assert 0 < len(fewer & base) < len(base)
    assert len(keys(measure=[{**measures[0], "n": 7}, measures[1]]) & base) == len(fewer & base)
    text = {**content(tiny_lab)["reference"], "limit": 7}
    drawn = {key for key, cell in plan.cells.items() if cell.ablation is not None and cell.ablation.how == "resample"}
    assert keys(reference=text) & base == base - drawn


def test_what_the_measure_says_about_positions_and_directions(tiny_lab, tmp_path):
    """Prefixes are known for every kind of data, also where a fact's prompts are; directions come from a file."""
    from safetensors.torch import save_file

    width = ModelView.open(tiny_lab).width
    rows = torch.linalg.qr(torch.randn(width, 3, generator=torch.Generator().manual_seed(1))).Q.T.contiguous()
    save_file({"L0": rows}, tmp_path / "d.safetensors")
    grid = content(
        tiny_lab,
        ablate=[
            {"components": ["L0.mlp"], "positions": "prefix", "controls": 0},
            {"name": "some", "components": ["L0.mlp"], "positions": [0, 2], "controls": 0},
            {"directions": str(tmp_path / "d.safetensors"), "how": ["zero", "mean"], "each": True},
            {"windows": [1, 2]},
        ],
    )
    plan = Plan.of(Grid.of(grid))
    rows = sweep(plan, tmp_path / "out", plots=False)
    found = {(row.set, row.label): row.value for row in rows if row.figure == "mean nll" and not row.control}
    assert found["components", "L0.mlp"] != found["some", "L0.mlp"]
    assert {label for sets, label in found if sets == "directions"} == {"L0~0", "L0~1", "L0~2"}
    assert {label for sets, label in found if sets == "windows"} == {"L0", "L1", "L0-L1"}
    assert plan.notes == ("windows, L0-L1: 0 of 1 random controls; there are no others",)
    assert {row.positions for row in rows} == {"", "all", "prefix", "0 2"}


WRONG = {
    "no key is called 'modell'; did you mean model": {"modell": "x"},
    "model: 'model and models'; expected one of the two": {"models": ["x"]},
    r"data.recited: passages: '.*/nowhere.jsonl'; expected a file that is there": {
        "data": {"recited": {"passages": "{lab}/nowhere.jsonl"}}
    },
    "data.recited: limit: 0; expected at least 1": {"data": {"recited": {"text": "{lab}/corpus.jsonl", "limit": 0}}},
    "data.recited: limit: 'ten'; expected a whole number": {
        "data": {"recited": {"text": "{lab}/corpus.jsonl", "limit": "ten"}}
    },
    "data.recited: passages: 'passages and text'; expected one of passages, text and facts": {
        "data": {"recited": {"text": "{lab}/corpus.jsonl", "passages": "{lab}/passages.jsonl"}}
    },
    r"data: \{\}; expected at least one table": {"data": {}},
    r"measure\[0\]: name: 'extract'; expected one of .*extraction": {
        "measure": [{"name": "extract", "data": "recited"}]
    },
    r"measure\[0\]: data: 'ordinary'; expected one of recited, facts": {
        "measure": [{"name": "perplexity", "data": "ordinary"}]
    },
    r"measure\[0\]: data: 'facts'; expected passages or text, which perplexity": {
        "measure": [{"name": "perplexity", "data": "facts"}]
    },
    r"measure\[0\]: no key is called 'batchsize'; did you mean batch_size": {
        "measure": [{"name": "extraction", "data": "recited", "batchsize": 3}]
    },
    r"measure\[0\]: batch_size: 'big'; expected int": {
        "measure": [{"name": "extraction", "data": "recited", "batch_size": "big"}]
    },
    r"measure\[0\]: n 0, batch_size 32: expected at least 1": {
        "measure": [{"name": "extraction", "data": "recited", "n": 0}]
    },
    r"ablate\[0\]: components: missing; expected one of components, every": {"ablate": [{"how": "zero"}]},
    r"ablate\[0\]: how: 'erase'; expected one of zero, mean": {"ablate": [{"every": "head", "how": "erase"}]},
    r"ablate\[0\]: every: 'weight'; expected one of layer": {"ablate": [{"every": "weight"}]},
    r"ablate\[0\]: factors: \[2.0\]; expected scale or noise among how": {
        "ablate": [{"every": "head", "factors": [2.0]}]
    },
    r"ablate\[0\]: seeds: 'one'; expected a list of whole number": {"ablate": [{"every": "head", "seeds": "one"}]},
    r"ablate\[0\]: positions: 'middle'; expected one of all": {"ablate": [{"every": "head", "positions": "middle"}]},
    r"ablate\[0\]: positions: \[1, -1\]; expected numbers from 0": {
        "ablate": [{"every": "head", "positions": [1, -1]}]
    },
    r"ablate\[0\]: counts: missing; expected one of counts and fractions": {
        "ablate": [{"localization": "{lab}/model.safetensors"}]
    },
    r"ablate\[1\]: name: 'every' twice": {"ablate": [{"every": "head"}, {"every": "layer"}]},
    r"ablate: \[\]; expected at least one table": {"ablate": []},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_grid_that_cannot_be_used_is_refused_in_one_line(tiny_lab, said):
    changes = json.loads(json.dumps(WRONG[said]).replace("{lab}", str(tiny_lab)))
    with pytest.raises(InputError, match=said) as found:
        Grid.of(content(tiny_lab, **changes))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "said, changes",
    [
        ("ablate 'components', L0.mlp: short-circuit: L0.mlp", {"ablate": [
            {"components": ["L0.mlp"], "how": "short-circuit"}]}),
        (r"ablate 'components': no head \[9\] of L0.attn.out", {"ablate": [{"components": ["L0H9"]}]}),
        ("ablate 'windows': windows: 3; expected 1 to 2", {"ablate": [{"windows": [3]}]}),
        ("holds|was not written by memloc", {"ablate": [{"localization": "{lab}/model.safetensors", "counts": [1]}]}),
        ("no record matches", {"data": {"recited": {"passages": "{lab}/passages.jsonl#dose=7"}}, "measure": [
            {"name": "extraction", "data": "recited"}]}),
    ],
)  # fmt: skip
def test_what_the_model_or_the_data_have_not_is_said_before_anything_runs(tiny_lab, said, changes):
    changes = json.loads(json.dumps(changes).replace("{lab}", str(tiny_lab)))
    with pytest.raises(MemlocError, match=said):
        Plan.of(Grid.of(content(tiny_lab, **changes)))


def test_a_plan_tells_what_cells_take(tiny_lab, plan, tmp_path):
    """Block-tokens to the token, and memory from above, for every kind of cell."""
    bench, seen = work.Bench(plan, tmp_path), set()
    for key, cell in plan.cells.items():
        kind = (cell.asked.name, cell.ablation and cell.ablation.how)
        if kind not in seen:
            view = bench._open(cell)
            with counted(view) as spent:
                bench.run(cell)
            assert spent.forward == plan.costs[key].forward and spent.bytes <= plan.costs[key].bytes
            seen.add(kind)
    assert len(seen) == 8
    text = plan.references[str(tiny_lab)]
    with counted(view) as spent:
        replace(text, tokens=7).usual(view, parts_of(view, named(view, ["L0H0"])[0]))
    assert spent.forward == plan.reading[str(tiny_lab)].forward


def test_a_reference_is_asked_for_where_it_is_needed(tiny_lab):
    grid = content(tiny_lab, ablate=[{"every": "head", "how": "mean"}])
    del grid["reference"]
    with pytest.raises(InputError, match=r"reference: missing; expected a text file, for mean in ablate\[0\]"):
        Grid.of(grid)


def test_an_unknown_figure_ends_the_run_at_its_first_cell(tiny_lab, plan, whole, tmp_path):
    measures = [{"name": "extraction", "data": "recited", "batch_size": 4, "figures": ["recall"]}]
    wrong = Plan.of(Grid.of(content(tiny_lab, measure=measures)))
    with pytest.raises(InputError, match="extraction gives no figure 'recall'; it gives strict rate"):
        sweep(wrong, tmp_path)
    assert len(missing(wrong, tmp_path)) == len(wrong.cells)
    assert not missing(wrong, whole), "figures are no part of a cell"
    with pytest.raises(InputError, match="gives no figure 'recall'"):
        sweep(wrong, whole)


def test_parquet_holds_the_same_table(whole, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = read_csv(whole / "table.csv")
    odd = replace(rows[0], value=math.inf, low=None)
    assert write_parquet(tmp_path / "t.parquet", [odd, *rows[1:]])
    found = [Row(**record) for record in parquet.read_table(tmp_path / "t.parquet").to_pylist()]
    assert found == [odd, *rows[1:]]
    assert (whole / "table.parquet").is_file()


def test_without_pyarrow_there_is_the_csv(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not write_parquet(tmp_path / "t.parquet", read_csv(whole / "table.csv"))
    assert not (tmp_path / "t.parquet").exists()


def test_infinite_and_missing_values_survive_the_csv(whole, tmp_path):
    rows = read_csv(whole / "table.csv")[:1]
    odd = [replace(rows[0], value=math.inf, difference_low=-math.inf, low=None, label="a,\nb")]
    write_csv(tmp_path / "t.csv", odd)
    assert read_csv(tmp_path / "t.csv") == odd
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArtifactError, match="columns"):
        read_csv(tmp_path / "t.csv")


# -- examples, command line, pictures ---------------------------------------------------------------------------------


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["heads", "layers"])
def test_the_worked_examples_run(tiny_lab, tmp_path, capsys, name):
    given = ["ablate", SCRIPTS / f"{name}.toml", "--with", f"lab={tiny_lab}", "--out", tmp_path / "out"]
    code, out, err = run(capsys, *given, "--plan")
    assert code == 0 and "cells (0 of them there already)" in out and not (tmp_path / "out").exists(), err
    code, out, err = run(capsys, *given, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {row["set"] for row in rows} == {"", *({"heads", "sublayers"} if name == "heads" else {"layers"})}
    changes = [row["difference"] for row in rows if row["figure"] == "exact memorization" and row["set"]]
    assert min(changes) < -0.05, "something must carry recitation"
    pictures = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    assert {f"{name}-extraction-recited.png", f"{name}-extraction-recited.svg"} <= pictures
    assert all(path.stat().st_size > 2000 for path in (tmp_path / "out" / "plots").iterdir())
    code, out, _ = run(capsys, *given, "--no-plots")
    assert "0 block-tokens forward for the 0 cells missing" in out and "exact memorization" in out


def test_the_example_in_python_runs(tiny_lab, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dose.py", str(tiny_lab), str(tmp_path)])
    runpy.run_path(str(SCRIPTS / "dose.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith("top ") and "random" in said
    rows = read_csv(tmp_path / "table.csv")
    assert {row.count for row in rows if row.set} == {4, 16, 64} and {row.control for row in rows} == {0, 1, 2, 3}


def test_the_command_says_in_one_line_what_is_wrong(tiny_lab, tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("model = [")
    code, _, err = run(capsys, "ablate", tmp_path / "bad.toml", "--out", tmp_path / "o")
    assert code == 2 and "bad.toml cannot be read as TOML" in err and err.count("\n") == 1
    code, _, err = run(capsys, "ablate", SCRIPTS / "heads.toml", "--out", tmp_path / "o")
    assert code == 2 and "names {lab}; give it with --with lab=VALUE" in err
    code, _, err = run(capsys, "ablate", SCRIPTS / "heads.toml", "--with", "lab", "--out", tmp_path / "o")
    assert code == 2 and "--with lab: expected NAME=VALUE" in err


def test_every_kind_of_set_has_a_picture_and_the_same_rows_the_same_bytes(whole, tmp_path):
    plain = read_csv(whole / "table.csv")
    one = next(row for row in plain if row.set and row.difference is not None)
    some = [
        replace(
            one, set="dose", label=f"top {count} of x", count=count, control=control, value=0.1 * count, grain="neuron"
        )
        for count in (1, 2, 4) for control in (0, 1, 2)
    ]  # fmt: skip
    some += [replace(one, set="factor", label="L0.mlp", factor=factor, how="scale") for factor in (0.0, 1.0, 2.0)]
    some += [
        replace(one, set="wide", label=f"L{n}", grain="layer", change="relative", difference=1.5) for n in range(14)
    ]
    found = dict(draw([*plain, *some]))
    assert set(found) == {
        "heads-extraction-recited", "heads-facts-facts", "some-extraction-recited", "some-facts-facts",
        f"dose-{one.measure}-{one.data}", f"factor-{one.measure}-{one.data}", f"wide-{one.measure}-{one.data}",
    }  # fmt: skip
    for name, picture in found.items():
        picture.save(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2 * len(found)
    for name, picture in dict(draw([*plain, *some])).items():
        picture.save(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_localization_gives_its_best_places(tiny_lab, tmp_path):
    view = ModelView.open(tiny_lab)
    passages = Passages.read(tiny_lab / "passages.jsonl", view.tokenizer)[:2]
    Activation()(view, passages).save(tmp_path / "where.safetensors")
    sets = [{"localization": str(tmp_path / "where.safetensors"), "fractions": [0.01], "per": "site", "controls": 2}]
    plan = Plan.of(Grid.of(content(tiny_lab, ablate=sets)))
    lines = [line for line in plan.lines if line.sets]
    top = Activation()(view, passages).top(fraction=0.01, per="site")
    assert lines[0].label == "top 1 % of activation" and lines[0].count == top.count
    assert lines[0].cell.ablation.names == Ablation(of=(top,)).names
    sizes = {tuple(len(entries) for entries in line.cell.ablation.of[0].indices().values()) for line in lines}
    assert len(sizes) == 1 and len({line.cell.ablation.digest for line in lines}) == 3
