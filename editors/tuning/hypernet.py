"""A small network that turns the gradient of one fact into an edit of a map: MEND's, shared by maps of one shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from memloc import store
from memloc.batches import Batch
from memloc.errors import ArtifactError, MismatchError
from memloc.gradients.map_gradients import pulls
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.provenance import Provenance
from memloc.sites import Site
from memloc.view import ModelView

KIND = "mend"
BLOCKS = 2


@dataclass(frozen=True)
class Signal:
    """What one map reads, and is pulled on, at the tokens of a fact: [t, in] and [t, out], float32."""

    read: Tensor
    pull: Tensor


class Hypernet(nn.Module):
    """(x, δ) of every token to (x̃, δ̃), and ΔW = -α Σ_t δ̃_t x̃_tᵀ.

    z = [x̂; δ̂], each entry less its mean over its spread on the training facts, goes through two blocks
    z := z + relu(s ⊙ (U V z + b) + o). U, V and b are shared by all maps of one shape; s, o and the step size α are a
    map's own. U starts at zero, so that an untrained network is a plain step along the normalised gradient.

    Args:
        sizes: site to (out, in).
        rank: of U V.
        alpha: step size to start with.
        seed: of V.

    Source: Mitchell et al. 2022, arXiv:2110.11309, from the equations; the sign is the descent's.
    """

    def __init__(self, sizes: Mapping[Site, tuple[int, int]], *, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.sizes, self.rank = dict(sorted(sizes.items())), rank
        generator = torch.Generator().manual_seed(seed)
        table: dict[str, nn.Parameter] = {}
        plain: dict[str, Tensor] = {}
        for out, read in sorted(set(self.sizes.values())):
            width = out + read
            for block in range(BLOCKS):
                name = f"{out}x{read}/{block}"
                table[f"{name}/U"] = nn.Parameter(torch.zeros(width, rank))
                noise = torch.randn(rank, width, generator=generator)
                table[f"{name}/V"] = nn.Parameter(noise * (2 / (width + rank)) ** 0.5)
                table[f"{name}/b"] = nn.Parameter(torch.zeros(width))
        for site, (out, read) in self.sizes.items():
            for block in range(BLOCKS):
                table[f"{site}/{block}/s"] = nn.Parameter(torch.ones(out + read))
                table[f"{site}/{block}/o"] = nn.Parameter(torch.zeros(out + read))
            table[f"{site}/alpha"] = nn.Parameter(torch.tensor(alpha))
            plain[f"{site}/mean"] = torch.zeros(out + read)
            plain[f"{site}/spread"] = torch.ones(out + read)
        self.table, self.plain = table, plain
        for name, parameter in table.items():
            self.register_parameter(name.replace(".", "_"), parameter)

    def learn_spread(self, signals: Sequence[Mapping[Site, Signal]]) -> None:
        """Take mean and spread of every entry from these facts; what never varies keeps a spread of 1."""
        for site in self.sizes:
            rows = torch.cat([torch.cat([entry[site].read, entry[site].pull], 1) for entry in signals]).double()
            spread = rows.std(0, unbiased=False)
            self.plain[f"{site}/mean"] = rows.mean(0).float()
            self.plain[f"{site}/spread"] = torch.where(spread > 0, spread, torch.ones_like(spread)).float()

    def forward(self, site: Site, signal: Signal) -> tuple[Tensor, Tensor]:
        """The change of `site`, as left [out, t] and right [t, in]; differentiable."""
        out, read = self.sizes[site]
        state = torch.cat([signal.read, signal.pull], 1)
        state = (state - self.plain[f"{site}/mean"]) / self.plain[f"{site}/spread"]
        for block in range(BLOCKS):
            name = f"{out}x{read}/{block}"
            made = state @ self.table[f"{name}/V"].T @ self.table[f"{name}/U"].T + self.table[f"{name}/b"]
            # A clamp passes the gradient at zero, where all of it starts; relu would not.
            state = state + (self.table[f"{site}/{block}/s"] * made + self.table[f"{site}/{block}/o"]).clamp_min(0)
        right, left = torch.split(state, [read, out], 1)
        return -self.table[f"{site}/alpha"] * left.T, right

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {name: entry.detach().clone() for name, entry in (*self.table.items(), *self.plain.items())}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored values.

        Raises:
            ArtifactError: one is missing or of another shape.
        """
        for name, entry in (*self.table.items(), *self.plain.items()):
            if name not in tensors or tensors[name].shape != entry.shape:
                raise ArtifactError(f"a trained network without {name} of shape {list(entry.shape)}")
        state = {name.replace(".", "_"): tensors[name] for name in self.table}
        self.load_state_dict(state)
        self.plain = {name: tensors[name] for name in self.plain}


@dataclass(frozen=True)
class Trained:
    """A network with what it was trained on.

    Attributes:
        net: the network.
        step: steps done.
        provenance: settings, seed, digests of model, facts and text.
        optimiser: its state, by name, to go on from.
    """

    net: Hypernet
    step: int
    provenance: Provenance
    optimiser: Mapping[str, Tensor]

    def save(self, path: str | Path) -> None:
        """Write `mend.safetensors`, atomically.

        Raises:
            TargetError: it cannot be written.
        """
        tensors = {f"net|{name}": entry for name, entry in self.net.tensors().items()}
        tensors |= {f"optimiser|{name}": entry for name, entry in self.optimiser.items()}
        sizes = {str(site): list(size) for site, size in self.net.sizes.items()}
        header = {"step": self.step, "rank": self.net.rank, "sizes": sizes, "provenance": self.provenance.to_json()}
        store.save(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Trained:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, KIND)
        sizes = {Site.parse(name): (int(out), int(read)) for name, (out, read) in header["sizes"].items()}
        net = Hypernet(sizes, rank=int(header["rank"]), alpha=0.0, seed=0)
        parts: dict[str, dict[str, Tensor]] = {"net": {}, "optimiser": {}}
        for name, entry in tensors.items():
            parts[name.partition("|")[0]][name.partition("|")[2]] = entry
        net.restore(parts["net"])
        return cls(net, int(header["step"]), Provenance.from_json(header["provenance"]), parts["optimiser"])

    def check(self, view: ModelView, path: str | Path) -> None:
        """See that it was trained on this very model.

        Raises:
            MismatchError: on another one.
        """
        if self.provenance.inputs.get("model") != view.digest:
            raise MismatchError(f"{path} was trained on another model than {view.name}; train one with `train-mend`")


def signal(view: ModelView, one: Passages, sites: Sequence[Site]) -> dict[Site, Signal]:
    """One fact's signal at every site: its answer's mean negative log-likelihood, forward and backward.

    The answer's last token predicts nothing and is left out.
    """
    (batch,) = view.batches(one, size=1)
    length = int(batch.length[0]) - 1
    _, found = pulls(view, batch, sites, loss=suffix_nll)
    return {
        site: Signal(entry.read[0, :length].detach().float().cpu(), entry.pull[0, :length].float().cpu())
        for site, entry in found.items()
    }


@contextlib.contextmanager
def changed(view: ModelView, factors: Mapping[Site, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While it lasts, maps put out W x + left right x; unlike `hook_form.as_if`, differentiable by the factors."""

    def change(site: Site, output: Tensor) -> Tensor:
        left, right = factors[site]
        more = ((seen[site].float() @ right.T.to(output.device)) @ left.T.to(output.device)).to(output.dtype)
        rows = view.place(site).rows
        if rows is None:
            return output + more
        whole = output.clone()
        whole[..., rows] = whole[..., rows] + more  # a fused map puts out several sites side by side
        return whole

    with view.record(list(factors), grad=True) as seen, view.replace(list(factors), change, side="output"):
        yield


def answered(view: ModelView, batch: Batch) -> Tensor:
    """Log-probabilities [k, v] at the batch's suffix positions."""
    row, column, _, _ = batch.suffix_index()
    return view.logits_at(batch, row, column).log_softmax(-1)
