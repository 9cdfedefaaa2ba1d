"""The whole loop on a model trained on the spot: measure, localize, unlearn, edit a fact, ship, verify, report.

Everything is real and seeded; the page it writes states what was found, whichever way it came out.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from memloc.lab.build import build
from memloc.lab.recipe import preset
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.weight_gradient import WeightGradient
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall, pooled
from memloc.measures.perplexity import Perplexity
from memloc.report import Condition, EditSummary, Located, Note, Report, Verdict, dose_curve

from editors.base import Request
from editors.checkpoint import apply_edit, undo_edit
from editors.control import random_like
from editors.edit import Edit
from editors.rewriters.rome import Rome
from editors.rewriters.sparse_fine_tune import SparseFineTune
from editors.trial import Group, Measured, comparisons, measure_groups
from memloc.cli import text_rows
from memloc.measurement import Measurement
from memloc.passages import Facts, Passages, read_jsonl
from memloc.progress import steps
from memloc.scores import Localization, Selection
from memloc.statistics import bootstrap_interval
from memloc.terminal import Terminal
from memloc.view import ModelView

SHARE = {"demo": 0.1, "tiny": 0.2}
"""Share of the blocks' weights that unlearning may touch."""


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


@dataclass(frozen=True)
class Unlearned:
    """Unlearning and its random control, measured."""

    groups: tuple[Group, ...]
    edit: Edit
    control: Edit
    selection: Selection
    before: Measured
    after: Measured
    random: Measured


@dataclass(frozen=True)
class Rewritten:
    """Facts edited one by one, each measured alone and pooled."""

    edit: Edit
    facts: Facts
    before: Measurement
    after: Measurement
    random: Measurement


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


def unlearn(
    view: ModelView, data: Material, found: Localization, editor: SparseFineTune, share: float, seed: int
) -> Unlearned:
    """Take the targets out where `found` says they are kept, and as much at random; measure both."""
    groups = groups_of(data)
    selection = found.top(fraction=share)
    request = Request(forget=data.targets, retain=data.named, text=data.kept_text, selection=selection, seed=seed)
    before = measure_groups(view, groups)
    edit = editor(view, request)
    after = _under(edit, view, lambda: measure_groups(view, groups))
    control = editor(view, replace(request, selection=selection.random_like(seed)))
    beside = _under(control, view, lambda: measure_groups(view, groups))
    return Unlearned(groups, edit, control, selection, before, after, beside)


def rewrite(view: ModelView, data: Material, editor: Rome, seed: int) -> Rewritten:
    """Change every fact alone, measure it under its own edit and under a random one of equal norm; pool."""
    recall = FactRecall()
    first: Edit | None = None
    before, after, beside = [], [], []
    for index in steps(range(len(data.facts)), "facts edited one by one"):
        one = data.facts[index : index + 1]
        edit = editor(view, Request(facts=one, text=data.kept_text, seed=seed))
        first = first or edit
        before.append(recall(view, one))
        after.append(_under(edit, view, lambda one=one: recall(view, one)))  # type: ignore[misc]
        control = random_like(edit, view, seed)
        beside.append(_under(control, view, lambda one=one: recall(view, one)))  # type: ignore[misc]
    if first is None:
        raise ValueError("no facts")
    pools = [pooled(parts, data.facts) for parts in (before, after, beside)]
    return Rewritten(first, data.facts, *pools)


def _under(edit: Edit, view: ModelView, work: Callable[[], Any]) -> Any:
    with edit.apply(view):
        return work()


def demo(out: Path, *, size: str, seed: int, terminal: Terminal) -> dict[str, Any]:
    """Run the loop and write `out`: lab/, localization.safetensors, two edits, two checkpoints, the report.

    The lab is kept from an earlier run with the same recipe; checkpoints of an earlier run are replaced.

    Returns:
        The verdicts and the paths, JSON values.

    Cost: about five minutes on two cores for the size "demo", under a minute for "tiny".
    """
    lab = build(preset(size, seed=seed), out / "lab", log=terminal.note)
    view = ModelView.open(lab)
    data = material(lab, view, facts=20 if size == "demo" else 6, seed=seed)
    say = terminal.note
    say(f"localizing {len(data.targets)} targets, beside {len(data.controls)} controls")
    weights = WeightGradient(grain="weight", scale="raw")(view, data.targets)
    weights.save(out / "localization.safetensors")
    full = data.targets + data.named + data.unnamed
    maps = WeightGradient(grain="component", reduce="sum", per_passage=True)
    shares, beside = maps(view, full), maps(view, data.controls)
    neurons = IntegratedGradients()
    by_neuron, by_neuron_control = neurons(view, data.targets), neurons(view, data.controls[: len(data.targets)])
    say(f"unlearning in {SHARE[size]:.0%} of the weights, then in as many at random")
    gone = unlearn(view, data, weights, SparseFineTune(), SHARE[size], seed)
    gone.edit.save(out / "unlearn.edit.safetensors")
    say(f"editing {len(data.facts)} facts one by one")
    changed = rewrite(view, data, Rome(), seed)
    changed.edit.save(out / "fact.edit.safetensors")
    say("writing, reloading and undoing checkpoints")
    shipped = [
        _ship(gone.edit, lab, out / "unlearned", gone.groups[0], gone.after),
        _ship(changed.edit, lab, out / "edited"),
    ]
    located = (
        _by_map(shares, beside),
        _by_neuron(by_neuron, by_neuron_control),
        Located(localization=weights, selection=gone.selection, title="Weights chosen for unlearning",
                text="Size of the gradient of the targets' loss, weight by weight.", n=len(data.targets)),
    )  # fmt: skip
    report = _report(view, data, gone, changed, located, (shares, beside), shipped, size, seed, out)
    written = report.save(out)
    for path in written:
        say(f"written: {path}")
    verdicts = report.to_json()["verdicts"]
    terminal.table("what was found", ["", "", ""],
                   [[_mark(entry["holds"]), entry["text"], entry["measured"]] for entry in verdicts])  # fmt: skip
    return {"out": str(out), "verdicts": verdicts, "report": [str(path) for path in written]}


def _mark(holds: bool | None) -> str:
    return {True: "yes", False: "NO", None: "·"}[holds]


def _ship(
    edit: Edit, lab: Path, folder: Path, group: Group | None = None, after: Measured | None = None
) -> list[Verdict]:
    """Write the checkpoint, load it with plain transformers, and undo it again; say what was seen."""
    from transformers import AutoModelForCausalLM

    if (folder / "memloc_edit.json").is_file():
        shutil.rmtree(folder)
    apply_edit(edit, lab, folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    view = ModelView.open(lab)
    with edit.apply(view):
        ids = torch.arange(1, 9)[None]
        with torch.no_grad():
            same = torch.equal(plain(ids).logits, view.model(ids).logits)
    found = [
        Verdict(f"{folder.name}/ loads in plain transformers and speaks as measured", same, "logits equal to the bit")
    ]
    if group is not None and after is not None:
        rows = group.measure(ModelView.open(folder), group.items).rows
        kept = [row["strict"] for row in rows] == [row["strict"] for row in after[group.name].rows]
        found.append(
            Verdict(f"{folder.name}/ reloaded gives the same verdict on every target", kept, f"{len(rows)} of them")
        )
    with tempfile.TemporaryDirectory() as scratch:
        undone = Path(scratch) / "undone"
        undo_edit(edit, folder, undone)
        back = (undone / "model.safetensors").read_bytes() == (lab / "model.safetensors").read_bytes()
    found.append(Verdict(f"Undoing {folder.name}/ gives back the original weights file", back, "byte by byte"))
    return found


def _by_map(shares: Localization, beside: Localization) -> Located:
    return Located(
        localization=shares, control=beside, title="Share of the gradient by layer and map",
        text="Each passage's gradient is divided by its own total first: raw gradients of text known by heart are many "
        "times smaller everywhere, because its loss is nearly zero.",
    )  # fmt: skip


def _by_neuron(found: Localization, beside: Localization) -> Located:
    return Located(
        localization=found, control=beside, title="Neurons of the targets (integrated gradients)",
        text="How much of the probability of each suffix token flows through each neuron, averaged over the suffix.",
    )  # fmt: skip


def _report(
    view: ModelView,
    data: Material,
    gone: Unlearned,
    changed: Rewritten,
    located: Sequence[Located],
    maps: tuple[Localization, Localization],
    shipped: Sequence[list[Verdict]],
    size: str,
    seed: int,
    out: Path,
) -> Report:
    planted = Extraction()(view, data.planted)
    full = [item.id for item in (data.targets + data.named + data.unnamed)]
    strict = {row["id"]: bool(row["strict"]) for row in planted.rows}
    recited = sum(strict[name] for name in full)
    controls = gone.before["targets"].control
    groups = comparisons(gone.groups, gone.before, gone.after, gone.random)
    rewritten = Group(name="facts edited one by one", measure=FactRecall(), items=data.facts, goal="learn",
                      explanation="Each fact changed alone by ROME and measured under its own edit; the random control "
                      "is a rank-one change of equal norm at the same place.",
                      headline=("efficacy accuracy", "paraphrase accuracy", "neighbour accuracy"))  # fmt: skip
    name = rewritten.name
    groups += comparisons([rewritten], {name: changed.before}, {name: changed.after}, {name: changed.random})
    lost = _lost(gone)
    verdicts: list[Verdict | Condition] = [
        Verdict("Before: passages planted at the full dose are recited", recited >= 0.95 * len(full),
                f"{recited} of {len(full)}; aim 95 %"),
        Verdict("Before: controls, never trained on, are not", controls is not None and controls["strict rate"] == 0,
                f"0 expected, found {controls['strict rate']:.0%} of {len(data.controls)}" if controls else ""),
        Condition(text="After: no target is recited", group="targets", figure="strict rate", at_most=0.0),
        Condition(text="After: targets are as unlikely as text never seen (log p_z)", group="targets",
                  figure="median log p_z", within_controls="log_pz"),
        Condition(text="After: retained passages are still recited", group="retained passages", figure="strict rate",
                  at_least=0.95),
        lost,
        Condition(text="After: held-out perplexity rises by at most 3 %", group="held-out text", figure="perplexity",
                  at_most=0.03, relative=True),
        Condition(text="ROME: the new answer is given", group=name, figure="efficacy accuracy", at_least=0.95),
        Condition(text="ROME: also after other phrasings", group=name, figure="paraphrase accuracy", at_least=0.85),
        Condition(text="ROME: neighbours keep their answers", group=name, figure="neighbour accuracy", at_least=0.90),
        *(verdict for entry in shipped for verdict in entry),
    ]  # fmt: skip
    with gone.edit.apply(view):
        texts = text_rows(data.targets, before=ModelView.open(out / "lab"), after=view)
    return Report(
        title=f"{len(data.targets)} passages unlearned and {len(data.facts)} facts edited in a lab model",
        model=str(view.model.name_or_path and "lab"),
        model_digest=view.digest,
        summary=_summary(gone, data),
        verdicts=tuple(verdicts),
        comparisons=groups,
        curves=(dose_curve({"before": planted}),),
        localizations=tuple(located),
        edits=(_summary_of("unlearn", gone.edit, out / "unlearn.edit.safetensors"),
               _summary_of("random control of unlearn", gone.control, None),
               _summary_of("one fact (the first of those edited)", changed.edit, out / "fact.edit.safetensors")),
        texts=texts,
        notes=(_lower_layers(*maps),),
        provenance={"size": size, "seed": seed, **gone.edit.provenance.to_json()},
        commands=(f"memloc demo --out {out.name} --size {size} --seed {seed}",),
        show_text=True,
    )  # fmt: skip


def _lost(gone: Unlearned) -> Verdict:
    """How many of the passages no set names were recited before and still are."""
    name = "passages named in no set"
    was = {row["id"] for row in gone.before[name].rows if row["strict"]}
    still = {row["id"] for row in gone.after[name].rows if row["strict"]} & was
    beside = {row["id"] for row in gone.random[name].rows if row["strict"]} & was
    share = len(still) / max(1, len(was))
    return Verdict("After: passages named in no set are still recited", share >= 0.90,
                   f"{len(still)} of {len(was)} ({share:.0%}; aim 90 %); random control {len(beside)}")  # fmt: skip


def _summary(gone: Unlearned, data: Material) -> str:
    before, after = gone.before, gone.after
    recall = [measured["targets"]["strict rate"] for measured in (before, after)]
    fluent = [measured["held-out text"]["perplexity"] for measured in (before, after)]
    kept = after["passages named in no set"]["strict rate"]
    return (
        f"{len(data.targets)} memorized passages were to be taken out of a small model trained on the spot. "
        f"Word-for-word recall of them went from {recall[0]:.0%} to {recall[1]:.0%}; of {len(data.unnamed)} other "
        f"memorized passages that no set names, {kept:.0%} are still recited; perplexity on unseen text went from "
        f"{fluent[0]:.1f} to {fluent[1]:.1f}."
    )


def _summary_of(name: str, edit: Edit, path: Path | None) -> EditSummary:
    sites = {}
    for site, norm in edit.norms.items():
        left = edit.survived.get(site)
        sites[str(site)] = {"norm": norm, **(left.to_json() if left else {})}
    header = {**edit.provenance.to_json(), "digest": edit.digest, "rounding": edit.rounding, "notes": dict(edit.notes)}
    return EditSummary(name=name, header=header, sites=sites, bytes=None if path is None else path.stat().st_size)


def layer_shares(found: Localization) -> dict[int, list[float]]:
    """Layer to each passage's share of its own gradient in that layer (from scores by map, kept per passage)."""
    total: dict[int, torch.Tensor] = {}
    for site, scores in found.scores.items():
        total[site.layer] = total.get(site.layer, torch.zeros(len(scores))) + scores
    whole = torch.stack(list(total.values())).sum(0)
    return {layer: (scores / whole).tolist() for layer, scores in sorted(total.items())}


def _lower_layers(mine: Localization, controls: Localization) -> Note:
    """The verdict on "memorized text pulls on lower layers": shares with bootstrap intervals."""
    one, other = layer_shares(mine), layer_shares(controls)
    lines = []
    for layer in one:
        means = [sum(rows[layer]) / len(rows[layer]) for rows in (one, other)]
        ends = [bootstrap_interval(rows[layer]) for rows in (one, other)]
        lines.append(f"layer {layer}: memorized {means[0]:.3f} [{ends[0][0]:.3f}, {ends[0][1]:.3f}], "
                     f"controls {means[1]:.3f} [{ends[1][0]:.3f}, {ends[1][1]:.3f}]")  # fmt: skip
    low, control = bootstrap_interval(one[0]), bootstrap_interval(other[0])
    held = "holds" if low[0] > control[1] else "does not hold" if low[1] < control[0] else "is not decided"
    return Note(
        heading="Do memorized passages pull on lower layers?",
        text=f"Share of the gradient in the lowest layer, memorized against controls: the claim {held} here. "
        + "; ".join(lines)
        + f". Means over {len(mine.passages or ())} memorized and {len(controls.passages or ())} control passages, "
        "95 % bootstrap intervals; each passage's shares sum to 1. Source: Stoehr et al. 2024, arXiv:2403.19851.",
    )
