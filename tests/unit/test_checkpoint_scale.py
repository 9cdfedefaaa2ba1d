"""A folder much larger than what an edit of it may take: memory for one tensor, disk for what is there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from editors.binding import Touched
from editors.deltas import LowRank
from editors.disk.shards import INDEX, open_weights
from editors.edit import Edit
from editors.shipping.checkpoint import apply_edit
from memloc.architectures import Place
from memloc.provenance import Provenance, digest_tensor
from memloc.sites import Kind, Site

SHAPE = (3000, 4100)
TENSOR = 2 * math.prod(SHAPE)
BOUND = TENSOR + (16 << 20)
"""One tensor, and what working on it piece by piece takes."""
SHARDS, EACH = 5, 20
NAME = "model.layers.{}.mlp.down_proj.weight"

MEASURED = """
import sys
from pathlib import Path
from editors.shipping.checkpoint import apply_edit
from editors.edit import Edit

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

edit = Edit.load(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
{work}
print(resident("VmHWM") - before)
"""
"""Peak of the resident set over what it is after the imports; the kernel's peak starts again at `clear_refs`. (That
of `getrusage` does not, and starts from the process that started this one.)"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """2.5 GB in five shards, all holes but the two edited tensors."""
    base = tmp_path_factory.mktemp("big")
    folder = base / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    table, deltas, touched = {}, {}, {}
    for shard in range(SHARDS):
        path = folder / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        names = [NAME.format(EACH * shard + number) for number in range(EACH)]
        table |= dict.fromkeys(names, path.name)
        places = {name: [number * TENSOR, (number + 1) * TENSOR] for number, name in enumerate(names)}
        header = {name: {"dtype": "BF16", "shape": SHAPE, "data_offsets": place} for name, place in places.items()}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + EACH * TENSOR)
            for number in (3, 17) if shard == 2 else ():
                stored = torch.randn(SHAPE, generator=generator).bfloat16()
                file.seek(8 + len(text) + number * TENSOR)
                file.write(stored.view(torch.uint8).numpy().data)
                site = Site(EACH * shard + number, Kind.MLP_OUT)
                touched[site] = Touched(Place(names[number]), "BF16", SHAPE, digest_tensor(stored))
                left = torch.randn(SHAPE[0], 1, generator=generator)
                deltas[site] = LowRank(left, torch.randn(1, SHAPE[1], generator=generator))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "config.json").write_text("{}")
    Edit(deltas, touched, Provenance("by hand")).save(base / "edit.safetensors")
    return base


def peak(base: Path, work: str) -> int:
    words = [sys.executable, "-c", MEASURED.format(work=work), str(base / "edit.safetensors"), str(base / "model")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its memory")
@pytest.mark.parametrize("link", [True, False], ids=["link", "copy"])
def test_an_edit_takes_the_memory_of_one_tensor(big, tmp_path, link):
    used = peak(big, f"apply_edit(edit, sys.argv[2], {str(tmp_path / 'out')!r}, link={link})")
    assert used < BOUND


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its memory")
def test_the_bound_on_memory_is_one_that_two_tensors_would_break(big):
    used = peak(big, f"held = [bytearray(b'x') * {TENSOR} for _ in range(2)]")
    assert used > BOUND


def test_holes_stay_holes_and_the_rest_is_the_same(big, tmp_path):
    apply_edit(Edit.load(big / "edit.safetensors"), big / "model", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > 2.4e9
    written = sum(path.stat().st_blocks * 512 for path in files)
    there = sum(path.stat().st_blocks * 512 for path in (big / "model").glob("*.safetensors"))
    assert written <= there + (4 << 20)
    assert (tmp_path / "out" / INDEX).read_bytes() == (big / "model" / INDEX).read_bytes()
    old, new = open_weights(big / "model"), open_weights(tmp_path / "out")
    assert old.entries == new.entries
    names = [NAME.format(number) for number in (0, 42, 43, 44, 57, 99)]
    changed = {name for name in names if old.entries[name].digest(old.folder) != new.entries[name].digest(new.folder)}
    assert changed == {NAME.format(43), NAME.format(57)}


def test_the_edited_tensor_is_what_torch_computes(big, tmp_path):
    edit = Edit.load(big / "edit.safetensors")
    apply_edit(edit, big / "model", tmp_path / "out", link=True)
    site = Site(57, Kind.MLP_OUT)
    name, parts = NAME.format(57), []
    for folder in (big / "model", tmp_path / "out"):
        with safe_open(folder / open_weights(folder).entries[name].file, framework="pt") as file:
            parts.append(file.get_slice(name)[1000:1010])
    wanted = parts[0].float() + (edit.deltas[site].left @ edit.deltas[site].right)[1000:1010]
    torch.testing.assert_close(parts[1].float(), wanted, rtol=2**-7, atol=1e-5)
