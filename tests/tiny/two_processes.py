"""What test_processes.py runs under torchrun: every method that can be shared, and moments; results go to a folder."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import cases
import torch
import zoo

from memloc import processes, shared_work
from memloc.methods import LOCALIZERS
from memloc.moments import second_moments
from memloc.sites import Kind
from memloc.view import ModelView

TEXT = zoo.passages(7, seed=5)
PASSAGES = zoo.passages(5)
CONTRAST = zoo.passages(3, seed=8)
NAMES = sorted(
    {*LOCALIZERS, "weight-gradient per passage", "prefix-perturbation exact", "activation-patching position"}
)


def view() -> ModelView:
    return ModelView.open(zoo.build("gpt2", dtype=torch.float64))


def whole(folder: Path) -> dict[str, object]:
    """What one process says."""
    looked = view()
    sites = looked.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
    moments = {"moments": second_moments(looked, TEXT, sites), "of one row": second_moments(looked, TEXT[:1], sites)}
    found = {}
    for name in NAMES:
        localizer = cases.made(name, looked, folder)
        if getattr(localizer, "in_parts", False):
            found[name] = localizer(looked, PASSAGES, contrast=CONTRAST)
    return {"localizations": found, **moments}


def localizations(folder: Path) -> dict[str, object]:
    looked = view()
    found = {}
    for name in NAMES:
        localizer = cases.made(name, looked, folder)
        if getattr(localizer, "in_parts", False):
            found[name] = shared_work.localize(localizer, looked, PASSAGES, contrast=CONTRAST)
    return found


def work(folder: Path) -> None:
    looked = view()
    sites = looked.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
    found = {
        "localizations": localizations(folder),
        "moments": shared_work.moments(looked, TEXT, sites),
        "of one row": shared_work.moments(looked, TEXT[:1], sites),
    }
    (folder / f"rank-{processes.rank()}.pickle").write_bytes(pickle.dumps(found))
    print("one line from each")


if __name__ == "__main__":
    processes.run(lambda: work(Path(sys.argv[1])))
    processes.leave(0)
