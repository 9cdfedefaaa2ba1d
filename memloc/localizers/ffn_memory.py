"""Feed-forward layers as memories: what wakes each neuron, what it then says, and which memories serve the suffix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.reading import composition
from memloc.reading.composition import Heard
from memloc.reading.promoted import CHUNK, DirectPath, Promoted, no_direct_path
from memloc.reading.triggers import CHUNK as PACKED
from memloc.reading.triggers import Triggers, purity, read_triggers, shuffled
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

WIDTH = 8
"""Tokens of a trigger's context that are spelled out."""

SHOWN = 5
"""Triggers of a neuron that are spelled out."""


@dataclass(frozen=True, kw_only=True)
class FfnMemory:
    """Score of a neuron = what it adds to the logits of those suffix tokens that its own memory promotes.

    A neuron is a key (the texts that wake it) and a value v [d] (the tokens it then promotes). Where the suffix's token
    y is predicted, with w what enters `mlp.out`, e_y and ē the unembedding's row of y and the mean of all rows, γ the
    final norm's gain, σ what it divides by there, and v̂ the value (its mean taken away under a layer norm):

        score = mean over the suffix of [y is among the tokens v promotes most] · w (e_y - ē)ᵀ (γ ⊙ v̂) / σ

    in logits above the vocabulary's mean, signed, the direct way only: what later layers make of it is left out. A
    memory that says y counts, one that merely leans to it does not: what is found carries less of the suffix than
    direct attribution's best. One axis of passages.

    Attributes:
        counts: "agreeing", as above; or "all": without the bracket, plain direct attribution.
        triggers: contexts kept a neuron, over `contrast` if given (ordinary text), else over the passages.
        promotes: how many tokens a value is said to promote most, and to suppress most.
        readings: for so many of the best neurons the notes spell out triggers, promoted and suppressed tokens.
        positions: suffix positions, at most, at which layers' outputs are compared with their neurons' (0: none).
        table: a file in which the triggers are kept, part by part; a run that finds it goes on where it ended.
        seed: of the shuffled controls in the notes.
        batch_size: texts per forward; no effect on scores.

    Notes, for each layer:
        agreement: share of neurons whose value's top token is the one that follows their strongest trigger, and the
        same for targets dealt to neurons at random (its expectation, exactly); the median place of that token in what
        the value promotes, and that of dealt ones; purity of triggers (share of the commonest last, and next, token),
        and that of dealt ones; how the layer's output is composed and what it does to the stream
        (memloc.reading.composition.shares). `readings`: the best neurons in words.

    Cost: one forward over passages and one over `contrast` (or the passages again); all values once through the
    unembedding (l·f·v·d multiplications).

    Source: Geva et al. 2021, arXiv:2012.14913, and 2022, arXiv:2203.14680. The score, the exact expectation of
    the shuffled control and the table of fixed size are ours.
    """

    counts: Literal["agreeing", "all"] = "agreeing"
    triggers: int = 25
    promotes: int = 10
    readings: int = 20
    positions: int = 256
    table: str | None = None
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if min(self.triggers, self.promotes, self.batch_size) < 1 or min(self.readings, self.positions) < 0:
            raise InputError(
                "triggers, promotes and batch_size: expected at least 1; readings and positions: 0 or more"
            )

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score all neurons, passage by passage; `contrast` is ordinary text in which triggers are looked for.

        Raises:
            InputError: no passages.
            MismatchError: `table` names a file of another model, of other texts or of another count.
        """
        if not passages:
            raise InputError("ffn-memory: no passages given")
        corpus = contrast or passages
        table = None if self.table is None else Path(self.table)
        keys = read_triggers(view, corpus, count=self.triggers, batch_size=self.batch_size, path=table)
        path, following = DirectPath.of(view), keys.tokens_at(1)
        dealt = torch.stack([shuffled(layer[:, :1], self.seed) for layer in following])
        targets = torch.cat([following[..., :1], dealt], -1)
        values = Promoted.of(path, count=self.promotes, targets=targets)
        scores, shares = self._scores(path, values, passages)
        by_site = {site: scores[site.layer] for site in view.sites(Kind.MLP_OUT)}
        origin = "the passages" if contrast is None else "contrast"
        notes: dict[str, Any] = {
            "corpus": {"of": origin, "texts": len(corpus), "tokens": len(keys.tokens)},
            "layers": {f"L{layer}": self._layer(keys, values, layer) | shares[layer] for layer in range(view.layers)},
            "readings": [self._reading(view, keys, values, *place) for place in _best(scores.mean(1), self.readings)],
        }
        inputs = {"model": view.digest, "passages": passages.digest}
        inputs |= {} if contrast is None else {"contrast": contrast.digest}
        provenance = Provenance("ffn-memory", settings_of(self), seed=self.seed, inputs=inputs)
        return Localization(Grain.NEURON, by_site, provenance, passages.ids, notes)

    @staticmethod
    def refuses(view: ModelView) -> str | None:
        """Why it has nothing to say of this family, or None."""
        return no_direct_path(view)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """A forward over the corpus of triggers (less, where `table` holds some already) and one over the passages."""
        corpus = contrast or passages
        neurons, wide = view.layers * view.neurons, 8 if view.dtype == torch.float64 else 4
        kept = neurons * (8 * (9 * self.triggers + 6 * self.promotes + 8) + 8 * len(passages))
        read = 2 * wide * view.vocab * view.width + 12 * min(max(CHUNK, view.vocab), view.neurons * view.vocab) * wide
        rows, tokens = widest(corpus, size=self.batch_size)
        packed = 6 * 8 * max(min(PACKED, rows * tokens * view.neurons), rows * tokens)
        first = pass_bytes(view, rows * tokens, context=tokens) + 2 * wide * rows * tokens * view.neurons + packed
        first += 32 * sum(len(item.ids) for item in corpus)
        rows, tokens = widest(passages, size=self.batch_size)
        spoken = rows * max(len(item.suffix) for item in passages)
        looked = min(self.positions, sum(len(item.suffix) for item in passages))
        second = pass_bytes(view, rows * tokens, context=tokens) + wide * view.layers * spoken * view.neurons
        second += wide * (spoken * (6 * view.neurons + 8 * view.width) + 2 * view.neurons * view.width)
        second += wide * looked * (view.layers * (view.neurons + 2 * view.width) + 4 * view.vocab + 12 * view.neurons)
        forward = sum(block_tokens(view, given, size=self.batch_size) for given in (corpus, passages))
        return Cost(forward, bytes=kept + read + max(first, second), bound="exact" if self.table is None else "at most")

    def _scores(self, path: DirectPath, values: Promoted, passages: Passages) -> tuple[Tensor, list[dict[str, float]]]:
        """Scores [l, n, f], and each layer's shares of the positions looked at."""
        view, looked = path.view, composition.chosen(passages, self.positions)
        scores = torch.zeros(view.layers, len(passages), view.neurons, dtype=path.dtype)
        sums = torch.zeros(view.layers, len(composition.SHARES), dtype=torch.float64)
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "memories at work"):
            heard = _listen(view, batch)
            row, _, token, _ = batch.suffix_index()
            wanted = path.towards(token, heard[view.layers - 1].residual)
            count = (batch.length - batch.prefix)[:, None].cpu()
            for site in view.sites(Kind.MLP_OUT):
                weight = view.weight(site).detach().to(wanted)
                share = heard[site.layer].neurons.to(wanted) * (wanted @ weight)
                if self.counts == "agreeing":
                    share = share * _says(values.most[site.layer].to(token.device), token)
                total = share.new_zeros(len(batch), view.neurons).index_add(0, row, share)
                scores[site.layer][list(batch.rows)] = total.cpu() / count
            index = composition.chosen_index(batch, looked)
            if bool(index.any()):
                some = {
                    layer: Heard(h.neurons[index], h.written[index], h.residual[index]) for layer, h in heard.items()
                }
                sums += composition.shares(path, values, some)
        positions = sum(len(entry) for entry in looked)
        named = [dict(zip(composition.SHARES, (row / max(1, positions)).tolist(), strict=True)) for row in sums]
        return scores, named if positions else [{} for _ in named]

    def _layer(self, keys: Triggers, values: Promoted, layer: int) -> dict[str, float | None]:
        """Agreement of keys and values, and purity of triggers, beside what dealing at random gives."""
        last, following = keys.tokens_at(0)[layer], keys.tokens_at(1)[layer]
        awake = following[:, 0] >= 0
        top, target = values.most[layer, awake, 0], following[awake, 0]
        size = int(max(top.max(), target.max())) + 1 if len(top) else 1
        both = torch.bincount(top, minlength=size).double() @ torch.bincount(target, minlength=size).double()
        rank, dealt = values.rank[layer, awake].double().unbind(1)
        return {
            "awake": float(awake.double().mean()),
            "agreement": float((top == target).double().mean()) if len(top) else None,
            "agreement_dealt": float(both) / len(top) ** 2 if len(top) else None,
            "target_rank": float(rank.median()) if len(top) else None,
            "target_rank_dealt": float(dealt.median()) if len(top) else None,
            "last_purity": purity(last),
            "last_purity_dealt": purity(shuffled(last, self.seed)),
            "next_purity": purity(following),
            "next_purity_dealt": purity(shuffled(following, self.seed)),
        }

    def _reading(
        self, view: ModelView, keys: Triggers, values: Promoted, layer: int, neuron: int, score: float
    ) -> dict[str, Any]:
        """One neuron in words."""
        found, triggers, hits = keys.where(layer, neuron), [], 0
        for strength, text, position in found:
            context, following = keys.context(text, position, WIDTH)
            hits += following == int(values.most[layer, neuron, 0])
            spelled = {"text": "".join(view.spell(context)), "next": view.spell([following])[0], "score": strength}
            triggers.append({**spelled, "passage": keys.names[text], "position": position})
        return {
            "site": str(Site(layer, Kind.MLP_OUT)),
            "index": neuron,
            "score": score,
            "triggers": triggers[:SHOWN],
            "promotes": list(view.spell(values.most[layer, neuron].tolist())),
            "suppresses": list(view.spell(values.least[layer, neuron].tolist())),
            "agreement": hits / len(found) if found else 0.0,
        }


def _listen(view: ModelView, batch: Batch) -> dict[int, Heard]:
    """Every layer where `batch` predicts its suffix, in the order of `batch.suffix_index`; one forward."""
    row, column, _, _ = batch.suffix_index()
    heard: dict[str, dict[int, Tensor]] = {"neurons": {}, "written": {}, "residual": {}}

    def hear(what: str, place: Site | int, tensor: Tensor) -> Tensor:
        heard[what][place.layer if isinstance(place, Site) else place] = tensor[row, column]
        return tensor

    sites = view.sites(Kind.MLP_OUT)
    with (
        view.replace(sites, partial(hear, "neurons")),
        view.replace(sites, partial(hear, "written"), side="output"),
        view.replace_blocks(range(view.layers), partial(hear, "residual")),
    ):
        view.hidden(batch)
    return {layer: Heard(**{what: entries[layer] for what, entries in heard.items()}) for layer in range(view.layers)}


def _says(most: Tensor, token: Tensor) -> Tensor:
    """Whether a neuron's promoted tokens [f, m] hold the token [k]: [k, f]."""
    said = torch.zeros(len(token), len(most), dtype=torch.bool, device=token.device)
    for column in most.unbind(1):
        said |= column == token[:, None]
    return said


def _best(scores: Tensor, count: int) -> list[tuple[int, int, float]]:
    """Layer, neuron and score of the largest of [l, f], the first among equals first."""
    order = scores.flatten().sort(descending=True, stable=True)
    pairs = zip(order.values.tolist()[:count], order.indices.tolist()[:count], strict=True)
    return [(*divmod(place, scores.shape[1]), score) for score, place in pairs]
