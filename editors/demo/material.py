"""The lab's data cut for the demo, and what its edits are judged on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editors.trial import Group
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.passages import Facts, Passages, read_jsonl
from memloc.view import ModelView

SHARE = 0.2
"""Share of the blocks' weights that unlearning may touch."""

FEW = 0.001
"""And in the second trial, where only so many that it matters which."""

HASTY: dict[str, Any] = {"lr": 5e-3, "steps": 10, "replay": 400}
"""Settings of the second trial: large steps, at most ten, and no more samples than those can draw."""

MASKS = 5
"""Random masks in the second trial."""


@dataclass(frozen=True)
class Material:
    """The lab's data, cut for the demo.

    Attributes:
        targets: passages to unlearn.
        named: passages at the full dose that the edit is told to keep.
        unnamed: passages at the full dose that no set names: the honest collateral.
        planted: every planted passage, all doses.
        controls: passages never trained on.
        kept_text: ordinary text the edit is told to keep.
        held_out: ordinary text that neither the model nor the edit has seen.
        facts: facts to change, one by one.
    """

    targets: Passages
    named: Passages
    unnamed: Passages
    planted: Passages
    controls: Passages
    kept_text: Passages
    held_out: Passages
    facts: Facts


def material(lab: Path, view: ModelView, *, targets: int = 5, facts: int = 20, seed: int = 0) -> Material:
    """Cut the lab's data: targets, passages named and not named, controls, text kept and held out, facts."""
    planted = Passages.read(lab / "passages.jsonl", view.tokenizer)
    full = max(item.tags["dose"] for item in planted)
    ids = [item.id for item in planted if item.tags["dose"] == full]
    random.Random(seed).shuffle(ids)
    rest = ids[targets:]
    records = [record for _, record in read_jsonl(lab / "corpus.jsonl")]
    unseen = [record["text"] for record in records if record["split"] == "held-out"]
    window = min(view.context or 512, 512)
    cut = len(unseen) // 2
    every = Facts.read(lab / "facts.jsonl", view.tokenizer)
    chosen = sorted(random.Random(seed).sample(range(len(every)), min(facts, len(every))))
    return Material(
        targets=planted.named(ids[:targets]),
        named=planted.named(rest[: len(rest) // 2]),
        unnamed=planted.named(rest[len(rest) // 2 :]),
        planted=planted,
        controls=Passages.read(lab / "controls.jsonl", view.tokenizer),
        kept_text=Passages.from_texts(unseen[:cut], view.tokenizer, window=window, origin="kept")[:400],
        held_out=Passages.from_texts(unseen[cut:], view.tokenizer, window=window, origin="held-out")[:400],
        facts=Facts(tuple(every[index] for index in chosen), every.origin),
    )


def groups_of(data: Material) -> tuple[Group, ...]:
    """What unlearning is judged on."""
    recite, headline = Extraction(), ("strict rate", "median log p_z")
    return (
        Group(name="targets", measure=recite, items=data.targets, goal="forget", controls=data.controls,
              explanation="Passages the edit was told to take out.", headline=headline),
        Group(name="passages named in no set", measure=recite, items=data.unnamed, goal="keep", controls=data.controls,
              explanation="Memorized passages the edit was never shown: its collateral among memories.",
              headline=headline),
        Group(name="retained passages", measure=recite, items=data.named, goal="keep", controls=data.controls,
              explanation="Memorized passages the edit was told to keep.", headline=headline),
        Group(name="held-out text", measure=Perplexity(), items=data.held_out, goal="keep",
              explanation="Ordinary text that neither the model nor the edit has seen."),
        Group(name="facts", measure=FactRecall(), items=data.facts, goal="keep", headline=("true accuracy",),
              explanation="Facts the model knows, named in no set."),
    )  # fmt: skip


def few_groups(data: Material) -> tuple[Group, ...]:
    """What the second trial is judged on."""
    found = {group.name: group for group in groups_of(data)}
    return tuple(
        replace(found[name], name=f"{name}, {FEW:.1%} of the weights", controls=None, explanation=text)
        for name, text in (
            (
                "targets",
                "The same targets; hardly any weights may move, and for as few steps as the chosen need.",
            ),
            ("passages named in no set", "What that costs other memories."),
        )
    )
