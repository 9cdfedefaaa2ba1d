"""What prefix maps, causal traces and attribution patching say of a trained lab, each beside its control.

    python scripts/claims/patching_on_lab.py LAB [--parts K04,K06,K16,AtP] [--count 50] [--facts 60] [--json FILE]

K04: a few distinctive early tokens of the prefix corrupt the whole continuation (quarters, heavy tail, rarity).
K06: what is recited is harder to corrupt than the model's own continuation of unseen prefixes; all of them, and pairs
matched by the mean NLL of that continuation.
K16: of facts the model knows, how much of the answer's probability comes back by token and layer; the control corrupts
as many tokens of the prompt that are not the subject's, drawn at random.
AtP: estimates for all neurons and heads against patching each exactly (zero and perturbed), and the audit's bounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from memloc.localizers.activation_patching import ActivationPatching
from memloc.localizers.attribution_patching import AttributionPatching
from memloc.localizers.causal_trace import CausalTrace
from memloc.passages import Facts, Passages, encode, read_jsonl
from memloc.patching.perturbation import Exchanges, PrefixMap, own_generator, recited
from memloc.patching.spot_check import Audit
from memloc.statistics import bootstrap_interval
from memloc.view import ModelView


def main() -> None:
    """Run the parts asked for; print and keep their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--parts", default="K04,K06,K16,AtP")
    parser.add_argument("--count", type=int, default=50, help="recited passages, and as many controls")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--exact", type=int, default=8, help="passages whose every neuron is patched exactly")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    view = ModelView.open(given.lab)
    parts = {"K04": k04, "K06": k06, "K16": k16, "AtP": atp}
    found = {}
    for name in given.parts.split(","):
        start = time.process_time()
        found[name] = parts[name](view, given)
        print(f"\n## {name} ({time.process_time() - start:.0f} CPU-s)")
        for key, value in found[name].items():
            print(f"{key}: {json.dumps(value)}")
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1))


def memorized(view: ModelView, given: argparse.Namespace) -> Passages:
    """Planted passages the model recites to the last token."""
    planted = Passages.read(given.lab / "passages.jsonl", view.tokenizer)
    own = recited(view, planted)
    return planted.where(lambda item: own.named([item.id])[0].suffix == item.suffix)[: given.count]


def controls(view: ModelView, given: argparse.Namespace) -> Passages:
    """Passages that were never trained on, with the model's own continuation as suffix."""
    return recited(view, Passages.read(given.lab / "controls.jsonl", view.tokenizer)[: given.count])


def mean(values: list[float]) -> dict[str, Any]:
    """With its 95 % bootstrap interval and n."""
    low, high = bootstrap_interval(values)
    return {"mean": round(fmean(values), 4), "low": round(low, 4), "high": round(high, 4), "n": len(values)}


def k04(view: ModelView, given: argparse.Namespace) -> dict[str, Any]:
    """Where the disruptive tokens are."""
    passages = memorized(view, given)
    maps = Exchanges(alternatives=4, decode=True).maps(view, passages)
    by_token = [found.changed.mean(1) for found in maps]
    counts = Counter(
        token
        for _, record in read_jsonl(given.lab / "corpus.jsonl")
        for token in encode(view.tokenizer, record["text"]).ids
    )
    quarters = [[float(part.mean()) for part in torch.tensor_split(entry, 4)] for entry in by_token]
    rarity = [
        spearman(torch.tensor([-counts[token] for token in item.prefix]).double(), entry)
        for item, entry in zip(passages, by_token, strict=True)
    ]
    worst = [found.worst(found.changed)[0] for found in maps]
    every = torch.cat([entry for entry in by_token])
    return {
        "recited": len(passages),
        "changed share by quarter of the prefix": [mean([row[q] for row in quarters]) for q in range(4)],
        "first position alone": mean([float(entry[0]) for entry in by_token]),
        "last position alone": mean([float(entry[-1]) for entry in by_token]),
        "positions that change >= half": round(float((every >= 0.5).double().mean()), 4),
        "positions that change nothing": round(float((every == 0).double().mean()), 4),
        "passages with such a position": round(fmean(float((entry >= 0.5).any()) for entry in by_token), 4),
        "share of all change held by the worst fifth of positions": mean([fifth(entry) for entry in by_token]),
        "position of the worst, quartiles": torch.tensor(worst).double().quantile(
            torch.tensor([0.25, 0.5, 0.75]).double()).tolist(),
        "Spearman correlation with rarity in the corpus": mean([value for value in rarity if value == value]),
    }  # fmt: skip


def fifth(entry: Tensor) -> float:
    """Share of the sum that the largest fifth of the entries holds."""
    top = entry.sort(descending=True).values[: max(1, len(entry) // 5)]
    return float(top.sum() / entry.sum().clamp_min(1e-12))


def k06(view: ModelView, given: argparse.Namespace) -> dict[str, Any]:
    """Recited against own continuations of unseen prefixes."""
    found = {}
    for name, passages in (("recited", memorized(view, given)), ("own words", controls(view, given))):
        found[name] = Exchanges(alternatives=4, decode=True).maps(view, passages)

    def each(maps: list[PrefixMap]) -> tuple[list[float], list[float], list[float]]:
        changed = [float(entry.changed.mean()) for entry in maps]
        drop = [float(entry.drop.double().mean()) for entry in maps]
        return changed, drop, [float(entry.rise.mean()) for entry in maps]

    rows = {name: each(maps) for name, maps in found.items()}
    nll = {name: [entry.nll for entry in maps] for name, maps in found.items()}
    # Each recited passage with the nearest control not taken yet, no further than a tenth of a nat away.
    free, pairs = set(range(len(nll["own words"]))), []
    for index, value in enumerate(nll["recited"]):
        near = min(free, key=lambda other: abs(nll["own words"][other] - value), default=None)
        if near is not None and abs(nll["own words"][near] - value) <= 0.1:
            pairs.append((index, near))
            free.discard(near)
    told: dict[str, Any] = {}
    for which, name in enumerate(("changed share", "tokens lost before the first mistake", "rise of NLL")):
        told[name] = {arm: mean(values[which]) for arm, values in rows.items()}
        if len(pairs) > 1:
            gaps = [rows["own words"][which][two] - rows["recited"][which][one] for one, two in pairs]
            told[f"{name}: own words less recited, matched pairs"] = mean(gaps)
    told["NLL of the continuation"] = {arm: mean(values) for arm, values in nll.items()}
    told["matched pairs"] = len(pairs)
    return told


def k16(view: ModelView, given: argparse.Namespace) -> dict[str, Any]:
    """Causal traces of facts the model knows, by role of the token."""
    facts = Facts.read(given.lab / "facts.jsonl", view.tokenizer).as_passages()
    own = recited(view, facts)
    known = facts.where(lambda item: own.named([item.id])[0].suffix == item.suffix and item.tags["subject"] is not None)
    known = known[: given.facts]
    told: dict[str, Any] = {"facts known": len(known)}
    arms = {
        "subject": known,
        "control span": Passages(tuple(dataclasses.replace(item, tags=elsewhere(item)) for item in known)),
    }
    for arm, passages in arms.items():
        for stream in ("block", "mlp", "attn"):
            found = CausalTrace(stream=stream, draws=10)(view, passages)  # type: ignore[arg-type]
            roles: dict[str, list[list[float]]] = defaultdict(list)
            for row, item in enumerate(passages):
                grid = torch.stack([found.scores[site][row] for site in sorted(found.scores)])
                for role, positions in roles_of(item.tags["subject"], len(item.prefix)).items():
                    if positions:
                        roles[role].append(grid[:, positions].mean(1).tolist())
            told[f"{arm}, {stream}: total effect"] = round(found.notes["total_effect_mean"], 4)
            told[f"{arm}, {stream}: clean, corrupted"] = [
                round(found.notes["clean_mean"], 4), round(found.notes["corrupted_mean"], 4)]  # fmt: skip
            for role, rows in roles.items():
                layers = [mean([row[layer] for row in rows]) for layer in range(view.layers)]
                told[f"{arm}, {stream}, {role}"] = {
                    "by layer": [entry["mean"] for entry in layers],
                    "best": max(layers, key=lambda entry: float(entry["mean"])),
                }
    return told


def roles_of(span: list[int], prefix: int) -> dict[str, list[int]]:
    """Positions by their part in the prompt; one that is both is the subject's."""
    start, end = span
    inside = {start, end - 1} | set(range(start, end))
    return {
        "last of the span": [end - 1],
        "rest of the span": [at for at in range(start, end - 1)],
        "after it": [at for at in range(end, prefix - 1) if at not in inside],
        "last of the prompt": [prefix - 1] if prefix - 1 not in inside else [],
    }


def elsewhere(item: Any) -> dict[str, Any]:
    """Tags with another span of the same length in the subject's place, as far as the prompt allows."""
    start, end = item.tags["subject"]
    size = min(end - start, max(start, len(item.prefix) - end))
    spans = [at for at in range(len(item.prefix) - size + 1) if at + size <= start or at >= end]
    pick = int(torch.randint(len(spans), (1,), generator=own_generator(0, item)))
    return {**item.tags, "subject": [spans[pick], spans[pick] + size]}


def atp(view: ModelView, given: argparse.Namespace) -> dict[str, Any]:
    """Estimates against exact effects."""
    passages = memorized(view, given)[: given.exact]
    told: dict[str, Any] = {"passages": len(passages)}
    for grain in ("neuron", "head"):
        for how, direction in (("zero", "noise"), ("perturbed", "noise"), ("perturbed", "denoise")):
            same: dict[str, Any] = {"grain": grain, "corrupt": how, "direction": direction}
            exact, taken = timed(ActivationPatching(**same, batch_size=128), view, passages)
            line, spent = timed(AttributionPatching(**same), view, passages)
            dropped, longer = timed(AttributionPatching(**same, graddrop=True), view, passages)
            name = f"{grain}, {how}, {direction}"
            told[f"{name}: AtP"] = {**compared(line, exact, unsigned=False), "CPU-s": spent, "CPU-s exact": taken}
            told[f"{name}: AtP, graddrop"] = {**compared(dropped, exact, unsigned=True), "CPU-s": longer}
            if how == "zero":
                verify = 20 if grain == "neuron" else 4
                told[f"{name}: truly missed"] = truly_missed(line, exact, verify)
                checked = AttributionPatching(**same, verify=verify, audit=8)(view, passages).notes
                if any(checked.get("audit_exact", ())):
                    told[f"{name}: audit"] = dataclasses.asdict(Audit.of(checked))
                told[f"{name}: verified"] = {
                    key: round(fmean(entry for entry in value if entry is not None), 4)
                    for key, value in checked.items()
                    if key.startswith(("verified", "joint"))
                }
    return told


def timed(method: Any, view: ModelView, passages: Passages) -> tuple[Any, float]:
    """What a method finds, and its CPU time."""
    start = time.process_time()
    found = method(view, passages)
    return found, round(time.process_time() - start, 2)


def compared(line: Any, exact: Any, *, unsigned: bool) -> dict[str, float]:
    """Means over passages: rank and linear correlation over all places, and how many of the best are among the best."""
    rows: dict[str, list[float]] = defaultdict(list)
    for name in exact.passages:
        one, two = (
            torch.cat([entry.of(name).scores[site] for site in sorted(entry.scores)]) for entry in (line, exact)
        )
        # Gradients that skip a layer give estimates without a sign.
        two = two.abs() if unsigned else two
        size = min(20, len(one) // 4)
        rows["Spearman"].append(spearman(one, two))
        rows["Pearson"].append(float(torch.corrcoef(torch.stack([one, two]))[0, 1]))
        best = [set(entry.argsort(descending=True)[:size].tolist()) for entry in (one, two)]
        rows[f"of the best {size}"].append(len(best[0] & best[1]) / size)
        best2 = set(one.argsort(descending=True)[: 5 * size].tolist())
        rows[f"of the best {size}, within the estimate's best {5 * size}"].append(len(best2 & best[1]) / size)
    return {key: round(fmean(values), 4) for key, values in rows.items()}


def spearman(one: Tensor, two: Tensor) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN where one side is constant."""
    ranks = []
    for entry in (one, two):
        _, place, count = entry.double().unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[place])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def truly_missed(line: Any, exact: Any, verify: int) -> float:
    """Mean over passages of the positive exact effects of all places but the `verify` best by estimate."""
    left = []
    for name in exact.passages:
        one, two = (
            torch.cat([entry.of(name).scores[site] for site in sorted(entry.scores)]) for entry in (line, exact)
        )
        left.append(float(two[one.argsort(descending=True)[verify:]].clamp_min(0).sum()))
    return round(fmean(left), 4)


if __name__ == "__main__":
    main()
