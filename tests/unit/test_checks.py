"""Every check of the battery fails where it should: a check that cannot fail checks nothing."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import pytest
import torch
import zoo

from memloc import checks
from memloc.checks import check_localizer, hands_off
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView


@pytest.fixture
def view():
    return ModelView.open(zoo.build("gpt2"))


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A localizer with nothing wrong: the mean entry into every neuron, over the real tokens."""

    batch_size: int = 2

    def score(self, entering, mask):
        return (entering * mask[..., None]).sum(1) / mask.sum(1)[:, None]

    def locate(self, view, passages):
        sites = view.sites(Kind.MLP_OUT)
        scores = {site: torch.zeros(len(passages), view.neurons) for site in sites}
        for batch in view.batches(passages, size=self.batch_size):
            with torch.no_grad(), view.record(sites) as seen:
                view.hidden(batch)
            for site in sites:
                scores[site][list(batch.rows)] = self.score(seen[site], batch.mask)
        return scores

    def inputs(self, view, passages):
        return {"model": view.digest, "passages": passages.digest}

    def __call__(self, view, passages, *, contrast=None):
        made = Provenance("sound", settings_of(self), inputs=self.inputs(view, passages))
        return Localization(Grain.NEURON, self.locate(view, passages), made, passages.ids)


class Touches(Sound):
    def locate(self, view, passages):
        view.parameter(Site(1, Kind.MLP_OUT)).data[0, 0] += 1
        return super().locate(view, passages)


class DrawsFromTheGlobalState(Sound):
    def locate(self, view, passages):
        return {site: scores + torch.rand(1) for site, scores in super().locate(view, passages).items()}


class DrawsQuietly(Sound):
    def locate(self, view, passages):
        with torch.random.fork_rng():
            return {site: scores + torch.rand(1) for site, scores in super().locate(view, passages).items()}


class CountsPadding(Sound):
    def score(self, entering, mask):
        return entering.mean(1)


class LooksAtCompany(Sound):
    def locate(self, view, passages):
        return {site: scores - scores.mean(0) for site, scores in super().locate(view, passages).items()}


class FavoursTheFirst(Sound):
    def __call__(self, view, passages, *, contrast=None):
        whole = super().__call__(view, passages)
        return dataclasses.replace(whole, scores={s: t[0] for s, t in whole.scores.items()}, passages=None)


class InventsALayer(Sound):
    def locate(self, view, passages):
        scores = super().locate(view, passages)
        return {**scores, Site(view.layers, Kind.MLP_OUT): scores[Site(0, Kind.MLP_OUT)]}


class LosesANeuron(Sound):
    def locate(self, view, passages):
        return {site: scores[:, 1:] for site, scores in super().locate(view, passages).items()}


class SaysNothing(Sound):
    def locate(self, view, passages):
        return {site: torch.ones_like(scores) for site, scores in super().locate(view, passages).items()}


class ForgetsTheModel(Sound):
    def inputs(self, view, passages):
        return {"passages": passages.digest}


class KeepsATuple(Sound):
    def __call__(self, view, passages, *, contrast=None):
        return dataclasses.replace(super().__call__(view, passages), notes={"pair": (1, 2)})


FAULTS = {
    Touches: "the weights changed",
    DrawsFromTheGlobalState: "torch's random state changed",
    DrawsQuietly: "scores differ between two runs",
    CountsPadding: r"batches of 2 instead of 1: L\d\.mlp\.out differs by",
    LooksAtCompany: "passage 'p0' on its own",
    FavoursTheFirst: "passages in reverse order",
    InventsALayer: r"L3\.mlp\.out is scored, but the model has no such place",
    LosesANeuron: r"L0\.mlp\.out: scores \[36\], neurons need \[37\]",
    SaysNothing: "all scores are the same",
    ForgetsTheModel: "no digest of the model",
    KeepsATuple: "differ after saving and loading",
}


def test_the_sound_localizer_passes(view):
    assert check_localizer(Sound(), view, zoo.passages(3)) == tuple(check.__name__ for check in checks.CHECKS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_localizer_is_caught_by_the_check_meant_for_it(fault, view):
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_localizer(fault(), view, zoo.passages(3))


TOUCHES = {
    "the weights changed": lambda view: next(view.model.parameters()).data.add_(1),
    "a buffer changed": lambda view: view.model.register_buffer("odd", torch.zeros(1)),
    "a parameter object changed": lambda view: setattr(
        view.block(0).mlp.c_proj, "weight", torch.nn.Parameter(view.block(0).mlp.c_proj.weight.detach().clone())
    ),
    "a requires_grad flag changed": lambda view: view.parameter(Site(0, Kind.MLP_OUT)).requires_grad_(False),
    "a gradient changed": lambda view: view.logits(next(view.batches(zoo.passages(1)))).sum().backward(),
    "a module changed": lambda view: setattr(view.block(0), "mlp", torch.nn.Identity()),
    "a hook changed": lambda view: view.block(0).register_forward_hook(lambda *_: None),
    "training mode changed": lambda view: view.model.train(),
    "torch's random state changed": lambda view: torch.rand(1),
    "Python's random state changed": lambda view: random.random(),
}


@pytest.mark.parametrize("sentence", TOUCHES)
def test_hands_off_notices(sentence, view):
    with torch.random.fork_rng(), pytest.raises(AssertionError, match=sentence), hands_off(view):
        TOUCHES[sentence](view)


def test_hands_off_is_content_with_looking(view):
    with hands_off(view):
        view.digest  # noqa: B018 - asked for its side effects, of which there are none
        Sound()(view, zoo.passages(2))


def test_ragged_passages_have_unequal_lengths_and_all_a_prefix_and_a_suffix():
    cut = checks.ragged(zoo.passages(4, prefix=5, suffix=3, ragged=False))
    assert [(len(item.prefix), len(item.suffix)) for item in cut] == [(5, 3), (4, 2), (3, 3), (5, 2)]
    least = checks.ragged(zoo.passages(4, prefix=1, suffix=1, ragged=False))
    assert {(len(item.prefix), len(item.suffix)) for item in least} == {(1, 1)}
