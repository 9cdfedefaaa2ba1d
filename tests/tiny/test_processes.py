"""Work shared by two processes equals the work of one; what goes wrong in one stops both with one line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
import zoo

from editors.cli import main
from memloc import processes, shared_work
from memloc.errors import InputError, MismatchError
from memloc.flags import shard
from memloc.localizers.activation import Activation
from memloc.localizers.grad_activation import GradActivation
from memloc.localizers.weight_gradient import WeightGradient
from memloc.passages import Passages
from memloc.scores import Localization
from memloc.view import ModelView

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("processes")


def torchrun(*command: object, count: int = 2) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    asked = [str(part) for part in (*launch, *command)]
    return subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(HERE / "two_processes.py", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "one line from each\n"  # the other's is dropped
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    return two_processes.whole(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def view():
    return ModelView.open(zoo.build("gpt2", dtype=torch.float64))


def settled(found: Localization) -> object:
    made = found.provenance
    return replace(made, settings={name: value for name, value in made.settings.items() if name != "earlier"})


def same(found: Localization, expected: Localization) -> None:
    assert (found.passages, found.lengths, found.grain) == (expected.passages, expected.lengths, expected.grain)
    # Where the test keeps its earlier checkpoint is no matter of the method.
    assert settled(found) == settled(expected)
    for site, scores in expected.scores.items():
        # Scores are kept in float32: computed alike to 1e-12, they may still be rounded to neighbours.
        torch.testing.assert_close(found.scores[site], scores, rtol=2e-7, atol=1e-12)


def test_every_method_says_the_same_in_two_processes(of_one, of_two):
    assert len(of_one["localizations"]) > 10
    for found in of_two:
        assert set(found["localizations"]) == set(of_one["localizations"])
        for name, expected in of_one["localizations"].items():
            same(found["localizations"][name], expected)


def test_that_two_processes_scored_different_passages_shows(of_one):
    first = of_one["localizations"]["grad-activation"]
    site = next(iter(first.scores))
    with pytest.raises(AssertionError):
        same(replace(first, scores={**first.scores, site: first.scores[site].flip(0)}), first)


@pytest.mark.parametrize("what", ["moments", "of one row"])
def test_moments_of_two_processes_are_those_of_one(of_one, of_two, what):
    for found in of_two:
        assert (found[what].count, found[what].provenance) == (of_one[what].count, of_one[what].provenance)
        for site, expected in of_one[what].sums.items():
            torch.testing.assert_close(found[what].sums[site], expected, rtol=1e-12, atol=1e-12)


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    zoo.build("llama", dtype=torch.float64).save_pretrained(folder / "model")
    records = [{"id": item.id, "prefix_ids": item.prefix, "suffix_ids": item.suffix} for item in zoo.passages(5)]
    (folder / "passages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def command(files: Path, method: str, *rest: object) -> list[str]:
    data = ["--model", files / "model", "--passages", files / "passages.jsonl"]
    return [str(part) for part in ("localize", method, *data, *rest)]


def test_torchrun_prints_and_writes_once_and_what_one_process_writes(files, capsys):
    done = torchrun("-m", "editors.cli", *command(files, "logit-lens", "--json", "--out", files / "two.safetensors"))
    assert done.returncode == 0, done.stderr
    assert main(command(files, "logit-lens", "--json", "--out", files / "one.safetensors")) == 0
    assert done.stdout.count('"plan"') == capsys.readouterr().out.count('"plan"') == 1
    same(Localization.load(files / "two.safetensors"), Localization.load(files / "one.safetensors"))
    assert not list(files.glob(".*.parts"))


def test_an_error_in_one_process_is_one_line_and_stops_both(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\nfrom memloc import processes\nfrom memloc.errors import InputError, MemlocError\n"
        "def work():\n    if processes.rank():\n        raise InputError('no such thing')\n    processes.exchange(1)\n"
        "    print('went on')\n"
        "try:\n    processes.run(work)\nexcept MemlocError as error:\n"
        "    open(sys.argv[1] + str(processes.rank()), 'w').write(str(error))\n"
    )
    done = torchrun(script, tmp_path / "said")
    assert (done.returncode, done.stdout) == (0, "")
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    assert said == ["process 1 of 2: no such thing"] * 2


def test_an_error_of_all_is_printed_once_and_nothing_is_written(files):
    out = files / "never.safetensors"
    done = torchrun("-m", "editors.cli", *command(files, "weight-gradient", "--out", out))
    lines = [line for line in done.stderr.splitlines() if line.startswith("memloc: ")]
    assert lines == ["memloc: WeightGradient scores all passages together; run it whole and in one process"]
    assert "exitcode  : 2" in done.stderr and not out.exists() and done.returncode != 0


@pytest.fixture
def launched(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "run", lambda work: work())


def test_verbs_that_cannot_be_shared_are_refused(launched, capsys):
    assert main(["list"]) == 2
    assert capsys.readouterr().err == "memloc: memloc list runs in one process; start it without torchrun\n"


def test_a_launcher_that_sets_no_number_is_told(launched, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="the environment's WORLD_SIZE is 'two', expected a number"):
        processes.count()


def test_without_a_launcher_torch_distributed_is_left_alone():
    script = "import torch\nbefore = torch.distributed.is_initialized()\nfrom memloc import processes\n"
    script += "processes.run(lambda: print(processes.exchange(3), processes.rank(), processes.device()))\n"
    script += "assert not torch.distributed.is_initialized() and not before"
    environment = {name: value for name, value in os.environ.items() if name not in processes.LAUNCHER}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[3] 0 None\n", 0)


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "of"), [(7, 3), (2, 5), (0, 2), (6, 1)])
def test_shares_follow_one_another_and_differ_by_one_at_most(count, of):
    passages = zoo.passages(count)
    shares = [shared_work.share(passages, number, of) for number in range(of)]
    assert [name for part in shares for name in part.ids] == list(passages.ids)
    lengths = [len(part) for part in shares]
    assert max(lengths) - min(lengths) <= 1


def shards(view: ModelView, localizer: Any, passages: Passages, of: int) -> list[Localization]:
    return [
        shared_work.marked(localizer(view, shared_work.sharded(passages, (n, of))), (n, of), passages)
        for n in range(1, of + 1)
    ]


def test_shards_merge_to_the_whole_in_whatever_order(view):
    passages = zoo.passages(5)
    parts = shards(view, GradActivation(), passages, 3)
    same(shared_work.merged(parts[::-1]), GradActivation()(view, passages))
    assert shared_work.MARK not in shared_work.merged(parts).notes


def test_shards_on_the_command_line_merge_to_the_whole(files, capsys):
    names = []
    for number in (1, 2):
        names.append(str(files / f"part-{number}.safetensors"))
        assert main(command(files, "logit-lens", "--shard", f"{number}/2", "--out", names[-1])) == 0
    whole, merged = files / "whole.safetensors", files / "merged.safetensors"
    assert main(["merge", *names, "--out", str(merged)]) == 0
    assert main(command(files, "logit-lens", "--out", whole)) == 0
    same(Localization.load(merged), Localization.load(whole))
    assert main(["merge", names[0], "--out", str(files / "half.safetensors")]) == 2
    assert "shard 2/2 is missing; nothing was merged" in capsys.readouterr().err
    assert not (files / "half.safetensors").exists()


def test_what_does_not_belong_together_is_not_merged(view):
    passages = zoo.passages(4)
    first, second = shards(view, GradActivation(), passages, 2)
    plain = [GradActivation()(view, passages[:2]), GradActivation()(view, passages[2:])]
    other = ModelView.open(zoo.build("gpt2", dtype=torch.float64, seed=1))
    wrong = {
        r"shard 2/2 is missing": [first],
        r"shard 1/2 is given 2 times": [first, first, second],
        r"some of these are shards and some are not": [first, plain[1]],
        r"shards of different passages, or of different counts": [
            first,
            shards(view, GradActivation(), passages, 3)[1],
        ],
        r"part 2 has another model than part 1": [plain[0], GradActivation()(other, passages[2:])],
        r"part 2 has another method than part 1": [plain[0], Activation()(view, passages[2:])],
        r"part 2 has another grain than part 1": [plain[0], GradActivation(grain="head")(view, passages[2:])],
        r"part 2 has another settings than part 1": [plain[0], GradActivation(batch_size=2)(view, passages[2:])],
        r"part 2 holds passage 'p1' once more": [plain[0], GradActivation()(view, passages[1:])],
    }
    for message, parts in wrong.items():
        with pytest.raises(MismatchError, match=message):
            shared_work.merged(parts)
    with pytest.raises(InputError, match="nothing to merge"):
        shared_work.merged([])
    with pytest.raises(InputError, match="part 1 holds one score for all its passages"):
        shared_work.merged([WeightGradient()(view, passages)])


def test_disjoint_localizations_that_are_no_shards_merge_as_given(view):
    passages = zoo.passages(4)
    parts = [GradActivation()(view, passages[2:]), GradActivation()(view, passages[:2])]
    found = shared_work.merged(parts)
    assert found.passages == ("p2", "p3", "p0", "p1")
    assert found.provenance.inputs["passages"] == f"{passages[2:].digest}+{passages[:2].digest}"


def test_a_shard_is_a_number_of_a_count():
    assert shard("2/7") == (2, 7)
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        with pytest.raises(InputError, match=r"expected NUMBER/COUNT, such as 1/4"):
            shard(text)
    with pytest.raises(InputError, match="shard 1/3 of 2 passages is empty; make at most 2"):
        shared_work.sharded(zoo.passages(2), (1, 3))


def test_what_cannot_be_divided_is_refused_before_the_model_is_read(files, capsys):
    assert main(command(files, "weight-gradient", "--shard", "1/2", "--model", "nowhere/at/all")) == 2
    assert "WeightGradient scores all passages together" in capsys.readouterr().err
    assert main(command(files, "grad-activation", "--shard", "1/2", "--joint", "3")) == 2
    assert "--joint scores all passages together, again and again" in capsys.readouterr().err
