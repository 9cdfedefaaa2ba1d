"""Heads that look for rare tokens: rank correlation of attention with rarity, and what it is worth against chance."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.reading.rarity import Types, passage_seed, pearson, token_counts
from memloc.running.outcomes import Outcome, outcome_bytes
from memloc.running.patterns import Attention, attention_bytes
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.statistics import bootstrap_interval
from memloc.view import ModelView

Query = Literal["last-prefix", "suffix", "all"]
BASELINES = ("uniform", "first token", "previous token")


@dataclass(frozen=True, kw_only=True)
class RareTokenHeads:
    """Score of a head = rank correlation of the attention it pays to the prefix's token types with their rarity.

    Per passage: each token type of the prefix counts once, with the mean attention a token of it receives (so a type
    that stands there often gets no more); Spearman's correlation of that with rarity in the corpus, ties sharing
    ranks. 1: attends strictly by rarity; 0: does not, or attends evenly; no unit. With `contrast` the corpus is that
    ordinary text and the passage itself, and there is an axis of passages; without, it is the passages together,
    a rarity that depends on their company, and scores are means.

    Attributes:
        query: who attends: "last-prefix", the position that predicts the first suffix token; "suffix", the mean of all
            that predict one; "all", the mean of every position that sees a key, each as a multiple of even attention.
        scale: "correlation", or "z": correlation times √(types - 1), its standard deviations from chance, exactly,
            since dealing rarities at random gives mean 0 and variance 1 / (types - 1).
        skip: leading tokens that are left out as keys: the first is an attention sink in many models, rare or not.
        permutations: random dealings of rarities within each passage for the notes' `p`, which is corrected for the
            number of heads (the largest of all heads in each dealing).
        ablate: whether to silence ("zero") or freeze ("mean", over the passages' tokens) the best heads, one by one;
            the notes then tell what becomes of the suffix, and of `contrast`.
        silenced: how many of them.
        seed: of the dealings.
        batch_size: passages per forward; no effect on scores.

    Notes:
        r, z and p of every head; the best head; the baselines: what a head scores that attends evenly, to the first
        token alone, or to the token before; share of attention on the first token; and the published statistic
        (attention summed in bins of dense rank, correlated with rank: rare is negative) beside what an even head has.

    Cost: one forward a passage, and the attention alone of every layer ⌈tokens / head width⌉ times; `ablate`:
    `silenced` forwards (and one without) over passages and contrast.

    Source: Stoehr et al. 2024, arXiv:2403.19851, section 5. Means instead of sums, ranks and the null are ours: the
    published statistic is strongly negative for a head that attends evenly.
    """

    query: Query = "last-prefix"
    scale: Literal["correlation", "z"] = "correlation"
    skip: int = 1
    permutations: int = 200
    ablate: Literal["none", "zero", "mean"] = "none"
    silenced: int = 4
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if min(self.skip, self.permutations) < 0 or min(self.silenced, self.batch_size) < 1:
            raise InputError("skip and permutations: expected at least 0; silenced and batch_size: at least 1")

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score all heads; `contrast` is ordinary text, by which tokens are called rare.

        Raises:
            InputError: no passages, or none whose prefix has three types of token to compare.
            ModelError: a family whose patterns cannot be read.
        """
        if not passages:
            raise InputError("rare-token-heads: no passages given")
        found = _Findings.empty(view, len(passages), max(len(item.prefix) for item in passages), self.permutations)
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "rare-token heads"):
            self._read(view, batch, passages, contrast, found)
        if not bool((found.types >= 3).any()):
            raise InputError(
                f"rare-token-heads: no prefix has 3 types of token beyond the first {self.skip}; lengthen it"
            )
        sites = view.sites(Kind.ATTN_OUT)
        corpus = "the passages together" if contrast is None else "contrast, and each passage by itself"
        notes: dict[str, Any] = {"corpus": corpus, **found.notes()}
        if self.ablate != "none":
            notes["ablation"] = self._ablation(view, passages, contrast, found)
        inputs = {"model": view.digest, "passages": passages.digest}
        inputs |= {} if contrast is None else {"contrast": contrast.digest}
        provenance = Provenance("rare-token-heads", settings_of(self), seed=self.seed, inputs=inputs)
        scores = found.r if self.scale == "correlation" else found.z()
        scores = scores.mean(0, keepdim=True) if contrast is None else scores
        by_site = {site: scores[:, site.layer] for site in sites}
        if contrast is None:
            return Localization(
                Grain.HEAD, {site: entry[0] for site, entry in by_site.items()}, provenance, notes=notes
            )
        return Localization(Grain.HEAD, by_site, provenance, passages.ids, notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """One forward over the passages; with `ablate`, one more for each head and for none, over contrast too."""
        rows, tokens = widest(passages, size=self.batch_size)
        suffix, prefix = max(len(item.suffix) for item in passages), max(len(item.prefix) for item in passages)
        queries = {"last-prefix": 1, "suffix": suffix, "all": tokens}[self.query]
        heads, ranks = view.layers * view.heads, 8 * (prefix + self.permutations)
        memory = pass_bytes(view, rows * tokens, context=tokens) + attention_bytes(view, rows, tokens, queries)
        memory += 8 * (rows * tokens * (5 * queries + 2 * heads) + heads * (ranks + 4 * len(passages)))
        memory += 16 * (self.permutations * (prefix + heads) + view.vocab) + 4096
        total = Cost(block_tokens(view, passages, size=self.batch_size), bytes=memory)
        if self.ablate == "none":
            return total
        for given in (passages, contrast or Passages(())):
            total += self._outcome_cost(view, given).times(1 + min(self.silenced, heads)) if given else Cost(0)
        return total

    def _outcome_cost(self, view: ModelView, passages: Passages) -> Cost:
        rows, tokens = widest(passages, size=self.batch_size)
        memory = pass_bytes(view, rows * tokens, context=tokens) + outcome_bytes(view, rows * tokens)
        memory += 8 * view.layers * view.heads * view.head_width + 512 * len(passages)
        return Cost(block_tokens(view, passages, size=self.batch_size), bytes=memory)

    def _read(
        self, view: ModelView, batch: Batch, passages: Passages, contrast: Passages | None, found: _Findings
    ) -> None:
        """Patterns of one batch into `found`."""
        attention = Attention.of(view, batch)
        at, weight = queries_of(batch, self.query)
        heads = [
            torch.einsum("nhqk,nqk->nhk", attention.pattern(layer, at).to(weight), weight).cpu()
            for layer in range(view.layers)
        ]
        received = torch.stack(heads, 1)
        plain = simple_patterns(at, batch.ids.shape[1], visible(batch, at)).to(weight)
        simple = torch.einsum("bnqk,nqk->nbk", plain, weight).cpu()
        ordinary = token_counts(passages if contrast is None else contrast, view.vocab)
        for index, row in enumerate(batch.rows):
            item = passages[row]
            corpus = ordinary if contrast is None else ordinary + token_counts([item], view.vocab)
            size = len(item.prefix)
            seen, plain = received[index, ..., :size], simple[index, :, :size]
            every = Types.of(item.prefix, corpus)
            found.bins[..., : len(set(every.rarity.tolist()))] += every.binned(seen)
            found.even_bins[: len(set(every.rarity.tolist()))] += every.binned(plain)[0]
            found.first[row] = seen[..., 0] / seen.sum(-1).clamp_min(1e-12)
            if size - self.skip < 3:
                continue
            types, kept = Types.of(item.prefix[self.skip :], corpus), seen[..., self.skip :]
            found.types[row] = len(types)
            found.r[row] = types.correlation(kept)
            found.baselines[row] = types.correlation(plain[:, self.skip :])
            found.null += types.permuted(kept, self.permutations, passage_seed(self.seed, item))
        if self.ablate == "mean":
            mask = batch.mask[..., None, None]
            for layer, mixed in attention.heads.items():
                found.written[layer] += (mixed.to(weight) * mask).sum((0, 1)).cpu()
            found.tokens += int(batch.mask.sum())

    def _ablation(
        self, view: ModelView, passages: Passages, contrast: Passages | None, found: _Findings
    ) -> dict[str, Any]:
        """What becomes of passages and contrast when the best heads are silenced, one at a time."""
        best = found.r.mean(0).flatten().argsort(descending=True, stable=True)[: self.silenced].tolist()
        given = {"passages": passages} | ({} if contrast is None else {"contrast": contrast})
        clean = {name: self._outcome(view, items) for name, items in given.items()}
        heads = []
        for flat in steps(best, "silencing heads"):
            layer, head = divmod(flat, view.heads)
            # Nothing is summed up unless means are asked for: then this is zero.
            value = found.written[layer, head] / max(1, found.tokens)
            with silenced(view, layer, head, value):
                figures = {name: self._outcome(view, items) for name, items in given.items()}
            heads.append({"site": str(Site(layer, Kind.ATTN_OUT)), "head": head, **figures})
        return {"clean": clean, "heads": heads}

    def _outcome(self, view: ModelView, passages: Passages) -> dict[str, float]:
        parts = ((batch, Outcome.of(view, batch)) for batch in view.batches(passages, size=self.batch_size))
        return Outcome.gathered(parts, len(passages)).means()


@dataclass
class _Findings:
    """What has been read so far: n passages, [l, h] heads, float64 on the CPU.

    Attributes:
        r: [n, l, h] rank correlations.
        types: [n], token types compared.
        baselines: [n, 3], what heads would score that attend as `BASELINES` say.
        first: [n, l, h], share of the first token in what the prefix receives.
        null: [draws, l, h], sums of correlations over passages, rarities dealt at random.
        bins: [l, h, ranks], attention summed by dense rank of count.
        even_bins: [ranks], the same of a head that attends evenly.
        written: [l, h, head width], sum of what heads put out.
        tokens: how many tokens that sum is over.
    """

    r: Tensor
    types: Tensor
    baselines: Tensor
    first: Tensor
    null: Tensor
    bins: Tensor
    even_bins: Tensor
    written: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, view: ModelView, count: int, prefix: int, draws: int) -> _Findings:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        heads = (view.layers, view.heads)
        return cls(
            r=zeros(count, *heads),
            types=zeros(count),
            baselines=zeros(count, len(BASELINES)),
            first=zeros(count, *heads),
            null=zeros(draws, *heads),
            bins=zeros(*heads, prefix),
            even_bins=zeros(prefix),
            written=zeros(*heads, view.head_width),
        )

    def z(self) -> Tensor:
        """[n, l, h]: each passage's correlation in standard deviations of chance."""
        return self.r * (self.types - 1).clamp_min(0).sqrt()[:, None, None]

    def notes(self) -> dict[str, Any]:
        """All heads, the best one and the baselines, as JSON values."""
        used = self.types >= 3
        mean = self.r[used].mean(0)
        z = self.r[used].sum(0) / (1 / (self.types[used] - 1)).sum().sqrt()
        p = self._family_wise(int(used.sum()) * mean)
        layer, head = divmod(int(mean.argmax()), mean.shape[1])
        low, high = bootstrap_interval(self.r[used][:, layer, head].tolist())
        best = {
            "site": str(Site(layer, Kind.ATTN_OUT)), "head": head, "r": float(mean[layer, head]),
            "interval": [low, high] if math.isfinite(low) else None, "z": float(z[layer, head]),
            "p": None if p is None else float(p[layer, head]), "passages": int(used.sum()),
        }  # fmt: skip
        ranks = int((self.even_bins > 0).sum())
        return {
            "r": _by_layer(mean),
            "z": _by_layer(z),
            **({} if p is None else {"p": _by_layer(p)}),
            "best": best,
            "baselines": dict(zip(BASELINES, self.baselines[used].mean(0).tolist(), strict=True)),
            "first_token_share": _by_layer(self.first.mean(0)),
            "published": _by_layer(pearson(self.bins[..., :ranks])),
            "published_even": float(pearson(self.even_bins[:ranks])),
        }

    def _family_wise(self, total: Tensor) -> Tensor | None:
        """P of every head [l, h] against the largest of all heads in each dealing; None without dealings."""
        if not len(self.null):
            return None
        largest = self.null.flatten(1).amax(1)
        return (1 + (largest[:, None, None] >= total).sum(0)) / (1 + len(largest))


def queries_of(batch: Batch, query: Query) -> tuple[Tensor, Tensor]:
    """Who attends: positions [n, q], and what each weighs in what a key receives, [n, q, k] float64."""
    rows, tokens = batch.ids.shape
    key = torch.arange(tokens, device=batch.ids.device)
    if query == "all":
        at = key.expand(rows, -1)
        sees = visible(batch, at) & batch.mask[..., None]
        return at, sees * sees.sum(-1, keepdim=True).double() / sees.sum(1, keepdim=True).clamp_min(1)
    count = (batch.length - batch.prefix)[:, None] if query == "suffix" else torch.ones_like(batch.prefix)[:, None]
    step = torch.arange(int(count.max()), device=key.device)
    at = (batch.first[:, None] + step).clamp_max(tokens - 1)
    return at, ((step < count).double() / count)[..., None].expand(-1, -1, tokens)


def visible(batch: Batch, at: Tensor) -> Tensor:
    """Which keys a query at `at` [n, q] may see, [n, q, k]: those up to its own, or all that are read."""
    if batch.truth is not None:
        return batch.mask[:, None].expand(-1, at.shape[1], -1)
    return torch.arange(batch.ids.shape[1], device=at.device) <= at[..., None]


def simple_patterns(at: Tensor, tokens: int, sees: Tensor | None = None) -> Tensor:
    """Heads one can think of, `[3, n, q, k]`, in the order of `BASELINES`; `sees` as `visible`, by default causal."""
    key, query = torch.arange(tokens, device=at.device), at[..., None]
    sees = key <= query if sees is None else sees
    even = sees / sees.sum(-1, keepdim=True)
    return torch.stack([even, (key == 0).expand_as(even), key == (query - 1).clamp_min(0)]).double()


@contextlib.contextmanager
def silenced(view: ModelView, layer: int, head: int, value: Tensor) -> Iterator[None]:
    """Put `value` [head width] in the place of what one head puts out, everywhere."""
    own = slice(head * view.head_width, (head + 1) * view.head_width)

    def change(_: Site, mixed: Tensor) -> Tensor:
        changed = mixed.clone()
        changed[..., own] = value.to(mixed)
        return changed

    with view.replace([Site(layer, Kind.ATTN_OUT)], change):
        yield


def _by_layer(table: Tensor) -> Mapping[str, list[float]]:
    return {f"L{layer}": row for layer, row in enumerate(table.tolist())}
