"""Time and memory of writing an edited checkpoint, against a plain copy: a 500 MB folder, one edited tensor.

Every run is a fresh process. Memory is the peak of its resident set over what the imports and the edit file cost;
time is taken inside the process, after the imports, against copying the touched weight file and fsyncing it. Runs
alternate, so that a busy machine hits both sides; the ratio is the median over neighbouring runs, and beside it that
of the fastest run of each, which a busy machine disturbs least.

    python scripts/benchmark/apply_edit.py [--runs 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path

LAYERS, WIDTH, NEURONS = 53, 768, 3072
NAME = "transformer.h.{}.mlp.c_proj.weight"


def build(base: Path, dtype: str, shards: int) -> Path:
    """A folder of `LAYERS` matrices (500 MB in float32) and an edit of rank one of the first."""
    import torch
    from safetensors.torch import save_file

    from editors.deltas import LowRank
    from editors.edit import Edit
    from memloc.architectures import Place
    from memloc.provenance import Provenance
    from memloc.sites import Kind, Site

    folder, kind = base / f"{dtype}-{shards}", getattr(torch, dtype)
    folder.mkdir()
    torch.manual_seed(0)
    count = LAYERS if kind == torch.float32 else 2 * LAYERS
    tensors = {NAME.format(layer): (0.02 * torch.randn(NEURONS, WIDTH)).to(kind) for layer in range(count)}
    names, table = list(tensors), {}
    for shard in range(shards):
        part = names[shard * count // shards : (shard + 1) * count // shards]
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text("{}")

    class View:
        """Only what binding an edit asks of a view: one parameter."""

        model = torch.nn.Module()
        name = "benchmark"

        def place(self, site: Site) -> Place:
            return Place(NAME.format(site.layer), transposed=True)

        def parameter(self, site: Site) -> torch.nn.Parameter:
            return torch.nn.Parameter(tensors[NAME.format(site.layer)])

        def tied(self, parameter: str) -> tuple[str, ...]:
            return ()

    delta = LowRank(0.01 * torch.randn(WIDTH, 1), torch.randn(1, NEURONS))
    edit = Edit.of(View(), {Site(0, Kind.MLP_OUT): delta}, Provenance("benchmark"))
    edit.save(base / f"{folder.name}.edit.safetensors")
    return folder


def resident(which: str) -> int:
    """Bytes of this process resident now ("VmRSS") or at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def work(verb: str, folder: Path, edit_file: Path, out: Path, link: bool) -> None:
    """In a fresh process: one apply, undo, or plain copy; prints seconds and bytes."""
    os.sync()
    if verb == "copy":
        name = "model.safetensors" if (folder / "model.safetensors").exists() else "model-00001-of-00005.safetensors"
        start = time.perf_counter()
        with (folder / name).open("rb") as old, out.open("wb") as new:
            shutil.copyfile(old.name, new.name)
            os.fsync(new.fileno())
        print(json.dumps({"seconds": time.perf_counter() - start}))
        return
    from editors.edit import Edit
    from editors.shipping.checkpoint import apply_edit, undo_edit

    edit = Edit.load(edit_file)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    {"apply": apply_edit, "undo": undo_edit}[verb](edit, folder, out, link=link)
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": resident("VmHWM") - before}))


def run(verb: str, folder: Path, edit_file: Path, out: Path, link: bool) -> dict[str, float]:
    """`work` in a process of its own."""
    words = [verb, str(folder), str(edit_file), str(out), *(["link"] if link else [])]
    found = subprocess.run([sys.executable, __file__, "--work", *words], capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(found.stdout)
    return measured


def compare(folder: Path, edit_file: Path, runs: int, link: bool) -> dict[str, object]:
    """Alternate copies and applies (and an undo); medians."""
    seconds, copies, extra, undone = [], [], [], []
    for number in range(runs):
        copied, out = folder.parent / "copy", folder.parent / f"out-{number}"
        plain = run("copy", folder, edit_file, copied, link)
        copied.unlink()
        applied = run("apply", folder, edit_file, out, link)
        back = run("undo", out, edit_file, folder.parent / "back", link)
        shutil.rmtree(out)
        shutil.rmtree(folder.parent / "back")
        seconds.append(applied["seconds"])
        copies.append(plain["seconds"])
        extra.append(applied["bytes"])
        undone.append(back["bytes"])
    tensor = NEURONS * WIDTH * (4 if "float32" in folder.name else 2)
    return {
        "folder": folder.name,
        "link": link,
        "runs": runs,
        "edit file / tensor": round(edit_file.stat().st_size / tensor, 3),
        "apply s": round(statistics.median(seconds), 3),
        "copy of the touched file s": round(statistics.median(copies), 3),
        "apply / copy": round(statistics.median(map(truediv, seconds, copies)), 2),
        "apply / copy, fastest of each": round(min(seconds) / min(copies), 2),
        "extra memory / tensor": round(max(extra) / tensor, 2),
        "undo: extra memory / tensor": round(max(undone) / tensor, 2),
    }


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        verb, folder, edit_file, out, *link = given.work
        work(verb, Path(folder), Path(edit_file), Path(out), bool(link))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        if shutil.disk_usage(place).free < 4 << 30:
            raise SystemExit(f"{place} has less than 4 GiB free; set TMPDIR to a larger disk")
        for dtype, shards, link in (("float32", 1, False), ("bfloat16", 1, False), ("float32", 5, True)):
            folder = build(Path(place), dtype, shards)
            rows.append(compare(folder, Path(place) / f"{folder.name}.edit.safetensors", given.runs, link))
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(folder)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
