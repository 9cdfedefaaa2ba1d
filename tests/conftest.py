"""Shared by every test: quiet threads before torch is imported, and no network."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny lab, trained once (seconds) for all workers of this run. Copy it to change it."""
    from memloc.lab.build import build
    from memloc.lab.recipe import preset

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (shared / "tiny-lab.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(preset("tiny"), shared / "tiny-lab")
