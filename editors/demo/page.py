"""The demo's page: verdicts, comparisons, pictures and findings from what the stages measured."""

from __future__ import annotations

from pathlib import Path

import torch

from editors.demo.material import FEW, SHARE, Material
from editors.demo.stages import Found, Mapped, Unlearned
from editors.edit import Edit
from editors.trial import Group, comparisons
from memloc.measures.facts import FactRecall
from memloc.report import Condition, EditSummary, Located, Note, Report, Verdict, dose_curve
from memloc.scores import Localization
from memloc.statistics import bootstrap_interval
from memloc.verbs.report import text_rows
from memloc.view import ModelView


def page(view: ModelView, found: Found, out: Path, command: str) -> Report:
    """The report on `found`.

    Args:
        view: the lab's model, unedited.
        found: what the stages measured.
        out: the demo's folder, where the edits lie.
        command: what was run.
    """
    data, gone, few, changed = found.data, found.gone, found.few, found.changed
    groups = comparisons(gone.groups, gone.before, gone.after, gone.random)
    groups += comparisons(few.groups, few.before, few.after, few.random)
    rewritten = Group(name="facts edited one by one", measure=FactRecall(), items=data.facts, goal="learn",
                      explanation="Each fact changed alone by ROME and measured under its own edit; the random control "
                      "is a rank-one change of equal norm at the same place.",
                      headline=("efficacy accuracy", "paraphrase accuracy", "neighbour accuracy"))  # fmt: skip
    name = rewritten.name
    groups += comparisons([rewritten], {name: changed.before}, {name: changed.after}, {name: changed.random})
    verdicts: list[Verdict | Condition] = [
        *_before(found),
        Condition(text="After: no target is recited", group="targets", figure="strict rate", at_most=0.0),
        Condition(text="After: targets are as unlikely as text never seen (log p_z)", group="targets",
                  figure="median log p_z", within_controls="log_pz"),
        Condition(text="After: every target's log p_z is at most the likeliest control's", group="targets",
                  figure="inside controls' range", at_least=1.0),
        Condition(text="After: retained passages are still recited", group="retained passages", figure="strict rate",
                  at_least=0.95),
        _lost(gone),
        Condition(text="After: held-out perplexity rises by at most 3 %", group="held-out text", figure="perplexity",
                  at_most=0.03, relative=True),
        Verdict("After: gone, or only hidden? What `memloc verify` finds (verified/report.html)", None,
                found.checked.sentence),
        _chosen_matter(found),
        Condition(text="ROME: the new answer is given", group=name, figure="efficacy accuracy", at_least=0.95),
        Condition(text="ROME: also after other phrasings", group=name, figure="paraphrase accuracy", at_least=0.85),
        Condition(text="ROME: neighbours keep their answers", group=name, figure="neighbour accuracy", at_least=0.90),
        *found.shipped,
    ]  # fmt: skip
    edited, controlled = view.copy(), view.copy()
    gone.edit.apply(edited)
    gone.control.apply(controlled)
    texts = text_rows(data.targets, before=view, after=edited, control=controlled)
    return Report(
        title=f"{len(data.targets)} passages unlearned and {len(data.facts)} facts edited in a lab model",
        model="lab",
        model_digest=view.digest,
        summary=_summary(gone, data),
        verdicts=tuple(verdicts),
        comparisons=groups,
        curves=(dose_curve({"before": found.planted}),),
        localizations=_located(found.maps, gone),
        edits=(_summary_of("unlearn", gone.edit, out / "unlearn.edit.safetensors"),
               _summary_of("random control of unlearn", gone.control, None),
               _summary_of(f"unlearn in {FEW:.1%} of the weights", few.edit, None),
               _summary_of("one fact (the first of those edited)", changed.edit, out / "fact.edit.safetensors")),
        texts=texts,
        notes=(_lower_layers(found.maps.shares, found.maps.shares_control), _which_weights(gone, few)),
        provenance=gone.edit.provenance.to_json(),
        commands=(command,),
        show_text=True,
    )  # fmt: skip


def _before(found: Found) -> tuple[Verdict, Verdict]:
    """What the model knew to begin with."""
    data = found.data
    full = {item.id for item in data.targets + data.named + data.unnamed}
    recited = sum(bool(row["strict"]) for row in found.planted.rows if row["id"] in full)
    control = found.gone.before["targets"].control
    said = sum(bool(row["strict"]) for row in control.rows) if control else len(data.controls)
    return (
        Verdict("Before: passages planted at the full dose are recited", recited >= 0.95 * len(full),
                f"{recited} of {len(full)}; aim 95 %"),
        Verdict("Before: controls, never trained on, are not", said == 0, f"{said} of {len(data.controls)}; aim 0"),
    )  # fmt: skip


def _located(maps: Mapped, gone: Unlearned) -> tuple[Located, ...]:
    return (
        Located(localization=maps.shares, control=maps.shares_control, title="Share of the gradient by layer and map",
                text="Each passage's gradient is divided by its own total first: raw gradients of text known by heart "
                "are many times smaller everywhere, because its loss is nearly zero."),
        Located(localization=maps.neurons, control=maps.neurons_control,
                title="Neurons of the targets (integrated gradients)",
                text="How much of the probability of each suffix token flows through each neuron, averaged over the "
                "suffix."),
        Located(localization=maps.weights, selection=gone.selection, title="Weights chosen for unlearning",
                text="Size of the gradient of the targets' loss, weight by weight.", n=len(gone.groups[0].items)),
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


def _chosen_matter(found: Found) -> Verdict:
    """With hardly any weights, those chosen should forget the targets and as many random ones should not."""
    few = found.few
    chosen = [bool(row["strict"]) for row in few.after[few.groups[0].name].rows]
    chance = [bool(row["strict"]) for part in found.chance for row in part.rows]
    return Verdict(f"{FEW:.1%} of the weights: targets forgotten if chosen, at least half recited if random",
                   sum(chosen) == 0 and 2 * sum(chance) >= len(chance),
                   f"chosen {sum(chosen)} of {len(chosen)}, random {sum(chance)} of {len(chance)} over "
                   f"{len(found.chance)} random masks")  # fmt: skip


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
    header = edit.summary()
    size = None if path is None else path.stat().st_size
    return EditSummary(name=name, sites=header.pop("sites"), header=header, bytes=size)


def _which_weights(gone: Unlearned, few: Unlearned) -> Note:
    """Whether the choice of weights mattered, at both budgets."""
    lines = []
    for share, trial in ((SHARE, gone), (FEW, few)):
        for group in (trial.groups[0], trial.groups[1]):
            arms = (trial.after[group.name], trial.random[group.name])
            chosen, chance = (sum(bool(row["strict"]) for row in arm.rows) for arm in arms)
            lines.append(f"{share:.1%} of the weights, {group.name.split(',')[0]}: recited {chosen} under the chosen "
                         f"and {chance} under the random ones, of {len(group.items)}")  # fmt: skip
    return Note(
        heading="Did it matter which weights were changed?",
        text="The edit with chosen weights stands beside one with as many random weights and as many steps. "
        + "; ".join(lines)
        + ". Where both columns agree, the budget did the work and not the localization.",
    )


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
