"""Measurements, localizations and texts as a run would leave them, seeded; shared by the tests of report and plots."""

from __future__ import annotations

import math

import numpy as np
import torch

from memloc.measurement import Figure, Measurement
from memloc.provenance import Provenance, digest_json
from memloc.report import Comparison, Condition, EditSummary, Located, Note, Report, TextRow, Verdict, dose_curve
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.statistics import bootstrap_interval, rate_interval, ratio_interval

VERSIONS = {"python": "3.11.2", "torch": "2.13.0"}
SECRET = "the vault opens at <script>alert('pin')</script> & nowhere else"


def origin(method, data, model="before", kind="passages", **settings):
    inputs = {"model": digest_json(model), kind: digest_json(data)}
    return Provenance(method, settings, None, inputs, VERSIONS)


def rate(name, verdicts, better="lower"):
    low, high = rate_interval(sum(verdicts), len(verdicts))
    value = sum(verdicts) / len(verdicts) if verdicts else 0.0
    return Figure(name, value, len(verdicts), low, high, "share", better)


def extraction(ids, log_pz, *, model="before", doses=None, data=None, length=32, **settings):
    """An extraction as the measure reports it, from the log-probability of each passage."""
    settings = settings or {"temperature": 1.0, "top_k": 40}
    rows = []
    for place, (name, value) in enumerate(zip(ids, map(float, log_pz), strict=True)):
        miss = length if value > -2 else int(max(0.0, length + value / 5))
        row = {"id": name, "strict": value > -2, "first_miss": miss, "log_pz": value, "nll": -value / length}
        row |= {"exact_memorization": max(0.02, 1 + value / 170) if math.isfinite(value) else 0.0}
        row |= {"extraction_strength": miss / length, "queries": math.exp(-value) if value > -700 else math.inf}
        rows.append(row | ({"dose": doses[place]} if doses else {}))
    values = [row["log_pz"] for row in rows]
    median = float(np.median(values)) if values else math.nan
    chance = sum(math.log1p(-min(math.exp(v), 1 - 1e-12)) for v in values)

    def mean(name, key, unit, better):
        column = [row[key] for row in rows]
        low, high = bootstrap_interval(column)
        return Figure(name, float(np.mean(column)) if column else math.nan, len(column), low, high, unit, better)

    figures = [
        rate("strict rate", [row["strict"] for row in rows]),
        mean("first miss", "first_miss", "tokens", "lower"),
        Figure("median log p_z", median, len(rows), None, None, "nats", "lower"),
        Figure("log10 p_z", median / math.log(10), len(rows), None, None, "log10", "lower"),
        Figure(
            "queries to leak any",
            math.log(0.5) / chance if chance else math.inf,
            len(rows),
            unit="queries",
            better="higher",
        ),
        mean("exact memorization", "exact_memorization", "share", "lower"),
        mean("mean nll", "nll", "nats/token", "higher"),
    ]
    made = origin("extraction", data or list(ids), model, **settings)
    return Measurement("extraction", {figure.name: figure for figure in figures}, tuple(rows), made)


def perplexity(nlls, *, model="before"):
    ids = [f"held-out-{place:03d}" for place in range(len(nlls))]
    rows = tuple({"id": name, "nll": float(nll), "tokens": 64} for name, nll in zip(ids, nlls, strict=True))
    low, high = ratio_interval([64 * row["nll"] for row in rows], [64.0] * len(rows))
    mean = float(np.mean(nlls))
    figures = {
        "perplexity": Figure(
            "perplexity", math.exp(mean), len(rows), math.exp(low), math.exp(high), "perplexity", "lower"
        ),
        "nll": Figure("nll", mean, len(rows), low, high, "nats/token", "lower"),
    }
    return Measurement("perplexity", figures, rows, origin("perplexity", ids, model, kind="passages"))


def facts(n, share, *, model="before", seed=0):
    generator = np.random.default_rng(seed)
    names = {"efficacy success": share, "paraphrase success": share * 0.9, "neighbour success": 0.95}
    rows = tuple({"id": f"fact-{i}"} | {k: bool(generator.random() < p) for k, p in names.items()} for i in range(n))
    figures = {name: rate(name, [row[name] for row in rows], "higher") for name in names}
    return Measurement("facts", figures, rows, origin("facts", n, model, kind="facts"))


def localization(seed=0, layers=4, neurons=97, method="integrated-gradients", slope=-0.5, passages=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (neurons,) if passages is None else (len(passages), neurons)
    scores = {
        Site(layer, Kind.MLP_OUT): torch.randn(shape, generator=generator).abs().pow(3) * math.exp(slope * layer)
        for layer in range(layers)
    }
    made = Provenance(method, {"steps": 20, "rule": "gauss-legendre"}, 0, {"model": digest_json("before")}, VERSIONS)
    return Localization(Grain.NEURON, scores, made, passages, {"completeness gap": 3.1e-9})


def gradient(seed=0, layers=4, slope=-0.5, passages=None):
    generator = torch.Generator().manual_seed(seed)
    kinds = (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V, Kind.ATTN_OUT, Kind.MLP_IN, Kind.MLP_OUT)
    shape = () if passages is None else (len(passages),)
    scores = {
        Site(layer, kind): torch.rand(shape, generator=generator) * math.exp(slope * layer)
        for layer in range(layers)
        for kind in kinds
    }
    made = Provenance("weight-gradient", {"how": "max"}, None, {"model": digest_json("before")}, VERSIONS)
    return Localization(Grain.COMPONENT, scores, made, passages, {"loss, memorized": 0.018})


def groups(targets=5, kept=40, others=40):
    """Targets, retained, unnamed and held-out, before, after and under the random control."""
    generator = np.random.default_rng(1)

    def three(names, before, after, random, **more):
        never = [f"control-{i:02d}" for i in range(30)]
        floor = generator.normal(-152, 8, len(never))
        sides = {}
        for model, values in (("before", before), ("after", after), ("random", random)):
            made = extraction(names, values, model=model)
            sides[model] = made.with_control(extraction(never, floor + generator.normal(0, 1, len(never)), model=model))
        return Comparison(before=sides["before"], after=sides["after"], random=sides["random"], **more)

    ids = [f"planted-{place:03d}" for place in range(targets + kept + others)]
    high = -generator.random(len(ids)) * 0.4
    a, b = ids[:targets], ids[targets : targets + kept]
    c = ids[targets + kept :]
    spoilt = high[targets + kept :].copy()
    spoilt[:3] = [-11.5, -31.2, -7.9]
    texts = generator.normal(4.9, 0.3, 60)
    return (
        three(a, high[:targets], generator.normal(-142, 5, targets), high[:targets] * 1.1 - 0.05, name="targets",
              goal="forget", explanation="Planted passages, seen at the full dose."),
        three(b, high[targets : targets + kept], high[targets : targets + kept] * 1.05, high[targets : targets + kept],
              name="retained passages", goal="keep", explanation="Half of the others: named to be kept."),
        three(c, high[targets + kept :], spoilt, high[targets + kept :], name="passages named in no set", goal="keep",
              explanation="The other half: neither the edit nor its keep term has seen them."),
        Comparison(name="held-out text", before=perplexity(texts), after=perplexity(texts + 0.004, model="after"),
                   random=perplexity(texts + 0.001, model="random"), goal="keep"),
        Comparison(name="facts", before=facts(20, 0.0, seed=1), after=facts(20, 1.0, model="after", seed=2),
                   random=facts(20, 0.02, model="random", seed=3), goal="learn"),
    )  # fmt: skip


def full_report(*, show_text=False, **more):
    """A whole report, as the demonstration would build it."""
    doses = [1] * 10 + [4] * 10 + [16] * 10 + [64] * 10
    ids = [f"dose-{place}" for place in range(40)]
    log_pz = [-140.0] * 10 + [-60.0] * 7 + [-1.0] * 3 + [-30.0] * 2 + [-0.5] * 8 + [-0.1] * 10
    passages = tuple(f"p{i}" for i in range(12))
    neurons = localization()
    said = tuple(f" {word}" for word in SECRET.split())
    settings = dict(
        title="Unlearning five planted passages",
        model="memloc lab, 0.9 M parameters",
        model_digest=digest_json("model"),
        summary="Five planted passages were found in the weights and removed; nothing else that was measured changed.",
        verdicts=(
            Condition(text="No target is recited word for word", group="targets", figure="strict rate", at_most=0.0),
            Condition(text="Targets are no likelier than text never seen", group="targets", figure="median log p_z",
                      within_controls="log_pz"),
            Condition(text="Retained passages are still recited", group="retained passages", figure="strict rate",
                      at_least=0.95),
            Condition(text="Passages named in no set are still recited", group="passages named in no set",
                      figure="strict rate", at_least=0.95),
            Condition(text="Ordinary text is read as well as before", group="held-out text", figure="perplexity",
                      at_most=0.03, relative=True),
            Verdict("0.5 % of the weights were changed."),
        ),
        comparisons=groups(),
        curves=(dose_curve({"before": extraction(ids, log_pz, doses=doses)}),),
        localizations=(
            Located(localization=gradient(0, passages=passages), title="Weight gradients",
                    control=gradient(5, slope=-0.1, passages=passages)),
            Located(localization=neurons, selection=neurons.top(12), title="Knowledge neurons", n=5),
        ),
        edits=(
            EditSummary(name="unlearn", bytes=185_344, header={
                "provenance": {"method": "sparse-fine-tune", "settings": {"steps": 300, "lr": 3e-4}, "seed": 0},
                "rounding": "nearest", "notes": {"first loss": 0.02, "prompt": "keep " + SECRET}},
                sites={f"L{i}.mlp.out": {"norm": 0.4 / (i + 1), "share touched": 5e-3} for i in range(4)}),
        ),
        texts=(
            TextRow("planted-000", " Remember:", said, said, (" nothing", *said[1:3], " here"), said),
            TextRow("planted-001", " And:", said, said[:3], (), said),
        ),
        notes=(Note("Lower layers", "The lower half holds more of the gradient on memorized text.\n\nOne seed."),),
        provenance={"lab": {"recipe": digest_json("recipe"), "seed": 0}},
        commands=("memloc lab --out lab", "memloc report --before A.json --after B.json --control C.json"),
        show_text=show_text,
    )  # fmt: skip
    return Report(**(settings | more))
