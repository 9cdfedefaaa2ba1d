"""What the model holds without saying it: the truth read in its layers, and among many samples of its words."""

from __future__ import annotations

import difflib

import numpy as np
import torch

from editors.verification.material import Effort, Material
from editors.verification.scores import Array, Heard, Scores
from memloc.passages import Passages
from memloc.patching.perturbation import own_generator
from memloc.progress import steps
from memloc.reading.readout import lens, row_means
from memloc.running.decoding import continuation
from memloc.view import ModelView


def layers(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """The stream after every block, read as if it were the last (logit lens): mean log p of the true tokens."""
    del effort, seed
    names = tuple(f"after layer {layer}" for layer in range(view.layers))
    parts, ranks = [], {}
    for name, part in (("targets", data.targets), ("controls", data.controls)):
        score, rank = _read(view, part)
        parts.append(Heard(part.ids, score))
        ranks[f"median rank of the true token, {name}"] = np.median(rank, 0).tolist()
    return Scores.of(names, parts, ranks)


def _read(view: ModelView, part: Passages) -> tuple[Array, Array]:
    score, rank = np.empty((len(part), view.layers)), np.empty((len(part), view.layers))
    for batch in steps(list(view.batches(part, size=16)), "verify: layers"):
        found = lens(view, batch)
        for table, values in ((score, found.logprob), (rank, found.rank.double())):
            # The first reading is the embedding's: it knows no context, and nothing can be hidden there.
            means = row_means(values[1:].T.double().cpu(), found.row.cpu(), len(batch))
            table[list(batch.rows)] = means.numpy()
    return score, rank


def sampled(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """The best of many samples: the longest run of the suffix that any of them holds, as a share of it."""
    many = data.fewer(effort.targets, effort.controls, seed)
    parts = [_best(view, part, effort, seed) for part in (many.targets, many.controls)]
    settings = {"samples": effort.samples, "temperature": effort.temperature}
    return Scores.of((f"best of {effort.samples} samples",), parts, settings)


def _best(view: ModelView, part: Passages, effort: Effort, seed: int) -> Heard:
    part.check(view.vocab, view.context)
    runs = np.zeros((len(part), 1))
    for at, item in enumerate(steps(part, "verify: samples")):
        generator = own_generator(seed, item)
        if view.device.type != "cpu":
            generator = torch.Generator(view.device).manual_seed(generator.initial_seed() % 2**63)
        start = torch.tensor([item.prefix] * effort.samples, device=view.device)
        made = continuation(view, start, len(item.suffix), temperature=effort.temperature, generator=generator)
        said = {tuple(row) for row in made.ids[:, len(item.prefix) :].tolist()}
        runs[at, 0] = max(longest_run(item.suffix, row) for row in said) / len(item.suffix)
    return Heard(part.ids, runs, runs == 1)


def longest_run(truth: tuple[int, ...], said: tuple[int, ...]) -> int:
    """Length of the longest stretch of `truth` found anywhere in `said`."""
    return difflib.SequenceMatcher(None, truth, said, autojunk=False).find_longest_match().size
