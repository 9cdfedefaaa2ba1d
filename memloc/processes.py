"""One piece of work in several processes: who is there, handing round results, and stopping together.

Processes are those `torchrun` starts (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT). Without
them every function here answers for one process, and torch.distributed is not imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

from memloc.errors import InputError, MemlocError

T = TypeVar("T")
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=7)
"""How long one process waits for the others. A process that dies is the launcher's to notice, not the clock's."""


class _AgreedError(MemlocError):
    """An error every process knows of already."""


def count() -> int:
    """How many processes share the work."""
    if not all(name in os.environ for name in LAUNCHER):
        return 1
    return max(1, _number("WORLD_SIZE"))


def rank() -> int:
    """Which of them this is, from 0; the first alone prints and writes."""
    return _number("RANK") if count() > 1 else 0


def device() -> str | None:
    """This process's own GPU where several processes share a machine's; None leaves the model where it would be."""
    if count() == 1:
        return None
    import torch

    return f"cuda:{_number('LOCAL_RANK')}" if torch.cuda.is_available() else None


def exchange(value: T) -> list[T]:
    """Every process's `value`, by rank; waits for all. One process gets its own back.

    Raises:
        MemlocError: another process failed on purpose; what it said.
    """
    return [value] if count() == 1 else _meet(value, None)


def run(work: Callable[[], None]) -> None:
    """Do `work` here and in all the other processes; an error on purpose in one is raised in all, so that none waits.

    What any but the first prints is dropped.

    Raises:
        MemlocError: of whichever process; the message names it where others had none or another.
    """
    if count() == 1:
        work()
        return
    with _group():
        try:
            with contextlib.nullcontext() if rank() == 0 else _silent():
                work()
        except _AgreedError:
            raise
        except MemlocError as error:
            _meet(None, str(error))
        else:
            _meet(None, None)


def leave(code: int) -> NoReturn:
    """End this process with `code`.

    At once where there are several: a thread of theirs that wakes while Python is being taken down aborts the process,
    now and then, after all its work is done.
    """
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _group() -> Iterator[None]:
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(_number("LOCAL_RANK"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        Path(os.devnull).open("w", encoding="utf8") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        yield


def _meet(value: T, error: str | None) -> list[T]:
    """Every process comes here equally often: with a result, or once with an error and then no more."""
    import torch.distributed as dist

    found: list[tuple[T, str | None]] = [(value, error)] * count()
    dist.all_gather_object(found, (value, error))
    errors = [said for _, said in found]
    told = [(index, said) for index, said in enumerate(errors) if said is not None]
    if told:
        index, said = told[0]
        raise _AgreedError(said if set(errors) == {said} else f"process {index} of {len(errors)}: {said}")
    return [entry for entry, _ in found]


def _number(name: str) -> int:
    found = os.environ.get(name, "0")
    if not found.isdigit():
        raise InputError(f"the environment's {name} is {found!r}, expected a number; it is the launcher's to set")
    return int(found)
