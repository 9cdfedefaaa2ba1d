"""Memory, time and disk of editing a checkpoint of the size of a 70B model: sharded, bfloat16, mostly holes.

The folder has the tensors of Llama-2-70B with their true shapes; only the tensors to be edited hold numbers, all
others are holes in sparse files, so that the disk need not be large. Every run is a fresh process; memory is the
peak of its resident set over what imports and the edit cost. The folder is removed afterwards.

    python scripts/benchmark/big_checkpoint.py [--layers 80] [--touch 2] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, NEURONS, KEYS, VOCAB = 8192, 28672, 1024, 32000
SHARD = 10 << 30
NAME = "model.layers.{}.mlp.down_proj.weight"


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape."""
    block = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (NEURONS, WIDTH), "mlp.up_proj": (NEURONS, WIDTH),
        "mlp.down_proj": (WIDTH, NEURONS), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def build(folder: Path, layers: int, touch: int) -> None:
    """The folder, and beside it an edit of rank one of the first `touch` layers."""
    import torch

    from editors.binding import Touched
    from editors.deltas import LowRank
    from editors.edit import Edit
    from memloc.architectures import Place
    from memloc.provenance import Provenance, digest_tensor
    from memloc.sites import Kind, Site

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.manual_seed(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers).items():
        if shards[-1] and 2 * sum(map(math.prod, [*shards[-1].values(), shape])) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    table, deltas, touched = {}, {}, {}
    chosen = {NAME.format(layer): Site(layer, Kind.MLP_OUT) for layer in range(touch)}
    for number, tensors in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        table |= dict.fromkeys(tensors, path.name)
        header, end = {}, 0
        for name, shape in tensors.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
            end += 2 * math.prod(shape)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            for name in chosen.keys() & tensors.keys():
                stored = (0.02 * torch.randn(tensors[name])).bfloat16()
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(stored.view(torch.uint8).numpy().data)
                touched[chosen[name]] = Touched(Place(name), "BF16", tensors[name], digest_tensor(stored))
                deltas[chosen[name]] = LowRank(0.001 * torch.randn(WIDTH, 1), torch.randn(1, NEURONS))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    Edit(deltas, touched, Provenance("benchmark")).save(folder.with_suffix(".edit.safetensors"))


def resident(which: str) -> int:
    """Bytes of this process resident now ("VmRSS") or at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def work(folder: Path, out: Path, link: bool) -> None:
    """In a fresh process: one apply; prints what it took."""
    from editors.edit import Edit
    from editors.shipping.checkpoint import apply_edit

    edit = Edit.load(folder.with_suffix(".edit.safetensors"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    written = apply_edit(edit, folder, out, link=link)
    took = time.perf_counter() - start
    linked = set(written.linked)
    disk = sum(path.stat().st_blocks * 512 for path in out.iterdir() if path.name not in linked)
    print(json.dumps({"seconds": took, "memory": resident("VmHWM") - before, "disk": disk, "linked": len(linked)}))


def naive(folder: Path) -> None:
    """In a fresh process: what a script does that loads the shard it edits; prints its memory."""
    from safetensors.torch import load_file

    table = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    held = {name: part.clone() for name, part in load_file(folder / table[NAME.format(0)]).items()}
    took = time.perf_counter() - start
    print(json.dumps({"seconds": took, "memory": resident("VmHWM") - before, "tensors": len(held)}))


def run(*words: str) -> dict[str, float]:
    """This file in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--work", *words], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Build, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--touch", type=int, default=2, help="layers that are edited")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        verb, folder, *rest = given.work
        if verb == "naive":
            naive(Path(folder))
        else:
            work(Path(folder), Path(rest[0]), verb == "link")
        return
    tensor, rows = 2 * WIDTH * NEURONS, []
    with tempfile.TemporaryDirectory() as place:
        if shutil.disk_usage(place).free < (4 + given.touch) * tensor:
            raise SystemExit(f"{place} has too little space; set TMPDIR to a larger disk")
        folder = Path(place) / "model"
        build(folder, given.layers, given.touch)
        size = sum(path.stat().st_size for path in folder.iterdir())
        count = len(list(folder.glob("*.safetensors")))
        print(json.dumps({"folder GB": round(size / 1e9, 1), "shards": count, "tensor MB": round(tensor / 1e6)}))
        for how in ("link", "copy"):
            out = Path(place) / f"out-{how}"
            found = run(how, str(folder), str(out))
            shutil.rmtree(out)
            rows.append(
                {
                    "how": how, "edited tensors": given.touch, "extra memory MB": round(found["memory"] / 1e6),
                    "extra memory / tensor": round(found["memory"] / tensor, 2), "seconds": round(found["seconds"], 1),
                    "linked shards": found["linked"], "new on disk MB": round(found["disk"] / 1e6),
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if available > 3 * SHARD:
            found = run("naive", str(folder))
            print(json.dumps({"how": "load the shard", "extra memory MB": round(found["memory"] / 1e6)}))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
