"""Every editor keeps its promises in every family and dtype: see `editors.checks`; hooks say what the edit says."""

from __future__ import annotations

import editor_cases as cases
import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.checks import check_applies_and_undoes, check_editor, check_survives_disk, hands_off
from editors.hook_form import as_if
from editors.methods import EDITORS
from memloc.batches import pad
from memloc.errors import InputError, MemlocError
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

NAMES = sorted({*EDITORS, *cases.VARIANTS})
WHOLE = ("gpt2", "qwen3")
"""Families of the whole battery: transposed and fused maps, gated ones."""
HALF = {"gpt_neox": torch.bfloat16, "llama": torch.float16, "gemma2": torch.bfloat16, "phi": torch.float16}


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("name", NAMES)
def test_every_editor_passes_the_battery(name, family, tmp_path):
    view = ModelView.open(zoo.build(family))
    if family in cases.case(name).refuses:
        return refused(name, family, view, tmp_path)
    check_editor(cases.made(name, view, tmp_path), view, cases.request(name, view), tmp_path)


@pytest.mark.parametrize("family", [family for family in zoo.CONFIGS if family not in WHOLE])
@pytest.mark.parametrize("name", sorted(EDITORS))
def test_every_editor_undoes_to_the_bit_in_every_family(name, family, tmp_path):
    view = ModelView.open(zoo.build(family, dtype=HALF.get(family, torch.float32)))
    if family in cases.case(name).refuses:
        return refused(name, family, view, tmp_path)
    editor, asked = cases.made(name, view, tmp_path), cases.request(name, view)
    with hands_off(view):
        edit = editor(view, asked)
    check_survives_disk(edit, tmp_path / "kept.edit.safetensors")
    check_applies_and_undoes(edit, view)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gpt_neox", "falcon_new"])
@pytest.mark.parametrize("name", [name for name in NAMES if cases.case(name).hooks])
def test_the_hook_form_says_what_the_edit_says(name, family, tmp_path):
    view = ModelView.open(zoo.build(family, dtype=torch.float64))
    if family in cases.case(name).refuses:
        return refused(name, family, view, tmp_path)
    edit = cases.made(name, view, tmp_path)(view, cases.request(name, view))
    batch = pad([item.ids for item in zoo.passages(3, seed=9)], device=view.device)
    with torch.no_grad():
        plain = view.logits(batch)
        with as_if(view, edit.deltas):
            hooked = view.logits(batch)
        with edit.apply(view):
            edited = view.logits(batch)
    moved = float((plain - edited).abs().max())
    # A low-rank product is rounded to float32 where it is added to a weight, and not where it is applied to an input.
    assert moved > 1e-5
    assert_close(hooked, edited, atol=1e-5 * max(1.0, moved), rtol=0)


def refused(name, family, view, folder):
    words = cases.case(name).refuses[family]
    with pytest.raises(MemlocError, match=words):
        cases.made(name, view, folder)(view, cases.request(name, view))


def test_hooks_refuse_what_is_looked_up(view_of):
    view = view_of("gpt2")
    with (
        pytest.raises(InputError, match=r"^embed: only maps inside blocks"),
        as_if(view, {Site(OUTSIDE, Kind.EMBED): None}),
    ):
        pass
