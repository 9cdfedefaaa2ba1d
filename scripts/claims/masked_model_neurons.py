"""On masked language models trained to know clozes: do neurons found at the mask carry the fact they were found for?

    python scripts/claims/masked_model_neurons.py [--seeds 3] [--facts 40] [--neurons 8]

Each model learns sentences "subject relation ANSWER end" of two relations, the answer, and nothing else, hidden. Then
`integrated-gradients` scores neurons for each fact, as knowledge neurons are scored, and the eight best are silenced by
an edit. Told are the mean probability of the fact's own answer, and of the other facts', before and after; the controls
are neurons drawn at random in the same layers, and the lowest-scored ones.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import BertConfig, BertForMaskedLM

from editors.base import Request
from editors.pruners.neuron_dropout import NeuronDropout
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.provenance import Provenance
from memloc.scores import Selection
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

START, END, MASK, ANSWERS = 1, 2, 3, 12


def facts(count: int, seed: int) -> Passages:
    """Facts of two relations, the answer before the last word."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        relation = index % 2
        answer = 4 + ANSWERS * relation + int(torch.randint(ANSWERS, (1,), generator=generator))
        prefix = (START, 4 + 2 * ANSWERS + 2 + index // 2, 4 + 2 * ANSWERS + relation)
        items.append(Passage(f"fact-{index}", prefix, (answer,), after=(END,)))
    return Passages(tuple(items), "facts")


def trained(known: Passages, seed: int) -> ModelView:
    """A masked language model that knows the facts."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    vocab = 1 + max(max(item.prefix) for item in known)
    config = BertConfig(vocab_size=vocab, max_position_embeddings=8, mask_token_id=MASK, pad_token_id=0, **sizes)
    view = ModelView.open(BertForMaskedLM(config))
    optimiser = torch.optim.AdamW(view.model.parameters(), lr=2e-3)
    batch = next(view.batches(known, size=len(known)))
    for _ in range(400):
        loss = suffix_nll(view, batch).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if float(loss.detach()) < 0.01:
            break
    return view


@torch.no_grad()
def chances(view: ModelView, known: Passages) -> torch.Tensor:
    """Probability of every answer."""
    batch = next(view.batches(known, size=len(known)))
    found = torch.zeros(len(known))
    found[list(batch.rows)] = (-suffix_nll(view, batch)).exp().float()
    return found


def chosen(scores: dict[Site, torch.Tensor], how: str, count: int, generator: torch.Generator) -> Selection:
    """Neurons by score: the best, the worst, or as many in each layer as the best, drawn at random."""
    sites = list(scores)
    flat = torch.cat([scores[site] for site in sites])
    best = torch.zeros(len(flat), dtype=torch.bool)
    best[flat.argsort(descending=how != "worst", stable=True)[:count]] = True
    masks = dict(zip(sites, best.split([len(scores[site]) for site in sites]), strict=True))
    if how == "random":
        masks = {site: mask[torch.randperm(len(mask), generator=generator)] for site, mask in masks.items()}
    return Selection(Grain.NEURON, masks, Provenance("by score"))


def main() -> None:
    """Print a row a seed and control."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--neurons", type=int, default=8)
    given = parser.parse_args()
    print("seed  neurons  own before  own after  others after  facts lost (own p < 1/2)")
    drops: dict[str, list[float]] = {"best": [], "random": [], "worst": []}
    for seed in range(given.seeds):
        known = facts(given.facts, seed)
        view, generator = trained(known, seed), torch.Generator().manual_seed(seed)
        before = chances(view, known)
        scored = IntegratedGradients()(view, known)
        for how, told in drops.items():
            own, others = [], []
            for row in range(len(known)):
                scores = {site: scored.scores[site][row] for site in view.sites(Kind.MLP_OUT)}
                edit = NeuronDropout()(view, Request(selection=chosen(scores, how, given.neurons, generator)))
                with edit.apply(view):
                    said = chances(view, known)
                own.append(float(said[row]))
                others.append(float(said[torch.arange(len(known)) != row].mean()))
            told.append(float(before.mean()) - statistics.mean(own))
            lost = sum(value < 0.5 for value in own)
            after, rest = statistics.mean(own), statistics.mean(others)
            print(f"{seed:4}  {how:7}  {before.mean():10.3f}  {after:9.3f}  {rest:12.3f}  {lost} of {len(known)}")
    print({how: round(statistics.mean(found), 3) for how, found in drops.items()}, "mean fall of the own answer")


if __name__ == "__main__":
    main()
