"""The walk through a new method is true: its code runs, and passes what every method must pass."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import zoo

from memloc import checks
from memloc.flags import add_fields
from memloc.truth.planted import plant
from memloc.view import ModelView

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new-method.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's Python as one module, in the order it stands there."""
    path = tmp_path_factory.mktemp("walk") / "excess_activation.py"
    path.write_text("\n\n".join(BLOCKS), encoding="utf8")
    spec = importlib.util.spec_from_file_location("excess_activation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["excess_activation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["excess_activation"]


@pytest.mark.parametrize("contrast", [None, zoo.passages(2, seed=9)], ids=["alone", "contrasted"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_walks_method_passes_the_battery(family, contrast, page, view_of):
    assert len(page.hold(view_of(family), zoo.passages(3), contrast)) == len(checks.CHECKS)


def test_the_walks_method_passes_the_battery_in_half_precision(page, view_of):
    page.hold(view_of("gpt2", torch.bfloat16), zoo.passages(3), None)


def test_the_walks_method_finds_the_planted_neuron(page):
    page.find(plant(ModelView.open(zoo.build("gpt2", tie_word_embeddings=False)), layer=1, neuron=7))


def test_the_walks_method_is_what_it_says(page, view_of):
    """One passage at a time, read off the module that follows the neurons, without masks or batches."""
    view, passages = view_of("gpt2"), zoo.passages(3)
    found = page.ExcessActivation()(view, passages)
    for site in found.scores:
        for row, passage in enumerate(passages):
            entered = []
            handle = view.module(site).register_forward_pre_hook(lambda _, given, kept=entered: kept.append(given[0]))
            view.model(torch.tensor([passage.ids]))
            handle.remove()
            said = entered[0][0, len(passage.prefix) - 1 : len(passage.ids) - 1].detach().abs()
            torch.testing.assert_close(found.scores[site][row], said.mean(0).float())


def test_its_settings_can_be_flags(page):
    import argparse

    parser = argparse.ArgumentParser()
    add_fields(parser, page.ExcessActivation)
    assert parser.parse_args(["--batch-size", "3"]).batch_size == 3


def test_every_place_the_page_names_is_there():
    names = set(re.findall(r"`((?:memloc|editors|tests|scripts)/[\w/.]*)`", PAGE))
    names -= {"memloc/localizers/excess_activation.py"}
    assert len(names) > 12
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
    assert all((ROOT / "docs" / link).exists() for link in re.findall(r"\]\((\w[\w.-]+\.md)\)", PAGE))
