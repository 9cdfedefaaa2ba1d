"""What the model itself says: the same prompt about other subjects, and other ways to the same answer.

An edit should reach the fact however it is asked for, and leave other subjects alone. Nobody has to list either: the
model knows whom it would put in the subject's place, and in which words it recalls the answer. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.facts.contexts import sample
from memloc import progress
from memloc.batches import pad
from memloc.passages import Fact, Prompt, decode, encode
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

KIN = 16
"""First tokens that a subject may have instead of its own: those nearest in the embedding."""

SLACK = 2
"""How many tokens a namesake may be shorter or longer than the subject."""


def namesakes(
    view: ModelView, prompt: Prompt, count: int, generator: torch.Generator, *, top_k: int = 10
) -> tuple[Prompt, ...]:
    """At most `count` prompts about others, the fittest first.

    Subjects are sampled from what stands before the subject and from first tokens like its own. Each sample is cut
    where the rest of the prompt follows most naturally (mean log-probability of its tokens), which is also what makes
    one fit. Those that share more than half of the subject's tokens from its start are dropped: they would tie down
    the subject itself.

    Args:
        view: the model.
        prompt: of the fact, with its subject's place.
        count: how many are wanted; twice as many are sampled.
        generator: on the CPU.
        top_k: each token is drawn from the k likeliest.

    Returns:
        Prompts, all different; none where the prompt does not hold its subject.

    Cost: a forward of about 2 x `count` rows for each of the subject's tokens, and one of five times as many rows.
    """
    if prompt.subject is None or count < 1:
        return ()
    start, end = prompt.subject
    head, subject, tail = prompt.ids[:start], prompt.ids[start:end], prompt.ids[end:]
    starts: list[tuple[int, ...]] = [(*head, kin) for kin in kin(view, subject[0])] * -(-count // KIN)
    length = min(end + SLACK, (view.context or end + SLACK + len(tail)) - len(tail))
    made = sample(view, starts, length, generator, top_k=top_k)
    if head:
        made += sample(view, [head] * count, length, generator, top_k=top_k)
    cuts = [
        (order, row[:cut] + tail, cut)
        for order, row in enumerate(made)
        for cut in range(max(start + 1, end - SLACK), length + 1)
        if _shared(row[start:cut], subject) <= len(subject) // 2
    ]
    best: dict[int, tuple[float, tuple[int, ...], int]] = {}
    for (order, ids, cut), fit in zip(cuts, _fits(view, [cut[1] for cut in cuts], len(tail)), strict=True):
        if order not in best or fit > best[order][0]:
            best[order] = fit, ids, cut
    ranked = sorted(best.values(), key=lambda entry: -entry[0])
    unique = {ids: cut for _, ids, cut in reversed(ranked)}
    fittest = list(dict.fromkeys(ids for _, ids, _ in ranked))[:count]
    return tuple(Prompt(ids, (start, unique[ids]), decode(view.tokenizer, ids)) for ids in fittest)


def recalls(
    view: ModelView,
    facts: Sequence[Fact],
    count: int,
    generator: torch.Generator,
    *,
    top_k: int = 10,
    least: float = 0.5,
) -> list[tuple[Prompt, ...]]:
    """For each fact at most `count` ways in which the model, started with its subject alone, comes to its answer.

    Texts are sampled that begin with the subject; where the present answer's first token is next with probability
    `least` or more, the text so far is a prompt for the fact. One a text, the likeliest first.

    Args:
        view: the model.
        facts: their subjects and present answers are used; their paraphrases are not looked at.
        count: how many are wanted for each; eight times as many texts are sampled.
        generator: on the CPU.
        top_k: each token is drawn from the k likeliest.
        least: the probability.

    Returns:
        Prompts, all different from each other and from the fact's prompt; none without a tokenizer.

    Cost: for each fact 8 x `count` rows of as many tokens as subject and prompt have, on cached keys, and a forward of
    them; facts of one length share the calls.
    """
    if view.tokenizer is None or count < 1:
        return [() for _ in facts]
    starts = [encode(view.tokenizer, fact.subject).ids for fact in facts]
    alike: dict[tuple[int, int], list[int]] = {}
    for index, (fact, start) in enumerate(zip(facts, starts, strict=True)):
        length = min(len(start) + len(fact.prompt.ids), view.context or 1 << 30)
        alike.setdefault((len(start), length), []).append(index)
    found: dict[int, tuple[Prompt, ...]] = {}
    for (begun, length), mine in progress.steps(alike.items(), "ways to the facts"):
        rows = sample(view, [starts[index] for index in mine for _ in range(8 * count)], length, generator, top_k=top_k)
        for place, index in enumerate(mine):
            own = rows[place * 8 * count : (place + 1) * 8 * count]
            found[index] = _recalled(view, facts[index], own, begun, count, least)
    return [found[index] for index in range(len(facts))]


@torch.no_grad()
def _recalled(
    view: ModelView, fact: Fact, rows: Sequence[tuple[int, ...]], begun: int, count: int, least: float
) -> tuple[Prompt, ...]:
    """Of rows that begin with the subject's `begun` tokens, the places where the answer is about to be given."""
    found: dict[tuple[int, ...], float] = {}
    unique = list(dict.fromkeys(rows))
    for first in range(0, len(unique), 64):
        part = unique[first : first + 64]
        batch, tail = pad(part, device=view.device), len(part[0]) - begun
        column = torch.arange(begun, begun + tail, device=view.device).repeat(len(batch))
        line = torch.arange(len(batch), device=view.device).repeat_interleave(tail)
        sure = view.logits_at(batch, line, column).softmax(-1)[:, fact.target_true[0]].view(len(batch), -1)
        for row, chance in zip(part, sure.tolist(), strict=True):
            best = max(range(len(chance)), key=chance.__getitem__, default=0)
            if chance and chance[best] >= least:
                found[row[: begun + best + 1]] = chance[best]
    found.pop(fact.prompt.ids, None)
    ranked = sorted(found, key=lambda ids: (-found[ids], ids))[:count]
    return tuple(Prompt(ids, (0, begun), decode(view.tokenizer, ids)) for ids in ranked)


@torch.no_grad()
def shared_ways(
    view: ModelView,
    facts: Sequence[Fact],
    ways: Sequence[Sequence[Prompt]],
    count: int,
    *,
    least: float = 0.5,
    most: int = 48,
) -> list[tuple[Prompt, ...]]:
    """For each fact at most `count` prompts: its own ways, then those of the others with its subject put in.

    A phrasing found for one subject is a way to another's fact where the model gives that one's present answer after
    it with probability `least` or more, whatever it was trained on.

    Args:
        view: the model.
        facts: the batch; their prompts are phrasings too.
        ways: what `recalls` found for each.
        count: how many are wanted for each.
        least: the probability.
        most: so many phrasings are tried, the commonest first.

    Cost: a forward of `most` rows for each fact.
    """
    frames: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for fact, mine in zip(facts, ways, strict=True):
        for prompt in (fact.prompt, *mine):
            if prompt.subject is not None:
                start, end = prompt.subject
                frame = prompt.ids[:start], prompt.ids[end:]
                frames[frame] = frames.get(frame, 0) + 1
    common = sorted(frames, key=lambda frame: (-frames[frame], frame))[:most]
    return [_ways_of(view, fact, mine, common, count, least) for fact, mine in zip(facts, ways, strict=True)]


def _ways_of(
    view: ModelView,
    fact: Fact,
    mine: Sequence[Prompt],
    frames: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    count: int,
    least: float,
) -> tuple[Prompt, ...]:
    if fact.prompt.subject is None or not count:
        return tuple(mine[:count])
    known = {prompt.ids for prompt in (fact.prompt, *mine)}
    # A subject is spelled in other tokens at the start of a text than behind a word.
    spelled = {bool(prompt.subject[0]): prompt.ids[slice(*prompt.subject)]
               for prompt in (*mine, fact.prompt) if prompt.subject is not None}  # fmt: skip
    tried = []
    for head, tail in frames:
        subject = spelled.get(bool(head))
        ids = head + subject + tail if subject else ()
        if tail and ids and ids not in known and len(ids) <= (view.context or len(ids)):
            tried.append(Prompt(ids, (len(head), len(head) + len(subject or ())), decode(view.tokenizer, ids)))
    if not tried:
        return tuple(mine[:count])
    batch = pad([prompt.ids for prompt in tried], device=view.device)
    last = view.logits_at(batch, torch.arange(len(tried), device=view.device), batch.length - 1)
    sure = last.softmax(-1)[:, fact.target_true[0]].tolist()
    found = [(chance, prompt) for chance, prompt in zip(sure, tried, strict=True) if chance >= least]
    ranked = sorted(found, key=lambda entry: (-entry[0], entry[1].ids))
    return (*mine, *(prompt for _, prompt in ranked))[:count]


def kin(view: ModelView, token: int) -> list[int]:
    """First tokens that a subject may have instead of `token`: those nearest in the embedding."""
    table = view.weight(Site(OUTSIDE, Kind.EMBED)).detach()
    alike = (table @ table[token]).float() / table.norm(dim=1).float().clamp_min(1e-12)
    return [int(kin) for kin in alike.topk(min(KIN, len(alike))).indices]


def _shared(row: Sequence[int], subject: Sequence[int]) -> int:
    count = 0
    for mine, its in zip(row, subject, strict=False):
        if mine != its:
            break
        count += 1
    return count


@torch.no_grad()
def _fits(view: ModelView, rows: Sequence[tuple[int, ...]], tail: int, *, size: int = 256) -> list[float]:
    """Mean log-probability of each row's last `tail` tokens; 0 where there is no tail."""
    if not tail:
        return [0.0] * len(rows)
    found: list[Tensor] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = pad(part, device=view.device)
        column = batch.length[:, None] - tail + torch.arange(tail, device=view.device)
        row = torch.arange(len(part), device=view.device)[:, None].expand_as(column)
        logs = view.logits_at(batch, row.reshape(-1), column.reshape(-1) - 1).log_softmax(-1)
        found.append(logs.gather(1, batch.ids[row, column].reshape(-1, 1)).view(len(part), tail).mean(1).cpu())
    return [float(fit) for fit in torch.cat(found)] if found else []
