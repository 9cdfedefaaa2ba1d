"""Train MEND's network: every step edits one fact in thought and asks what became of it and of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.tuning.descent import working_copy
from editors.tuning.hypernet import Hypernet, Trained, answered, changed, signal
from memloc import progress
from memloc.batches import pad
from memloc.errors import InputError, MismatchError, ModelError
from memloc.passages import Fact, Facts, Passage, Passages
from memloc.provenance import Provenance, settings_of
from memloc.sites import kinds_named
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Training:
    """How MEND's network is trained.

    A step takes one fact, forms its edit, and descends by Adam on

        edit_weight · mean NLL of the new answer after prompt and paraphrases, edited
        + KL(original ‖ edited) per token on the fact's neighbours, other facts' prompts and windows of text.

    Attributes:
        kinds: maps to edit.
        last: of that many last layers.
        rank: of the network.
        steps: how many.
        lr: of the network.
        alpha: step size an untrained network starts with.
        alpha_lr: of the step sizes.
        edit_weight: of the first term.
        others: prompts of other facts in a step.
        windows: windows of text in a step.
        window: tokens of each.
        clip: largest norm of the gradient.
        save_every: steps between two savings; what was interrupted goes on from the last.
        seed: of everything drawn.

    Source: Mitchell et al. 2022, arXiv:2110.11309; there edit_weight is 0.1, lr 1e-6, alpha 1e-4, clip 100.
    """

    kinds: str = "mlp.in,mlp.out"
    last: int = 3
    rank: int = 64
    steps: int = 600
    lr: float = 1e-3
    alpha: float = 1e-3
    alpha_lr: float = 1e-4
    edit_weight: float = 1.0
    others: int = 6
    windows: int = 2
    window: int = 24
    clip: float = 10.0
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("last", "rank", "window", "save_every"):
            if getattr(self, name) < (2 if name == "window" else 1):
                raise InputError(f"{name} {getattr(self, name)}: expected at least {2 if name == 'window' else 1}")
        for name in ("steps", "lr", "alpha_lr", "edit_weight", "others", "windows"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)}: expected 0 or more")

    def __call__(self, view: ModelView, facts: Facts, text: Passages | None, out: str | Path) -> Trained:
        """Train, saving to `out` as it goes; where `out` is there, of the same inputs, go on from it.

        Raises:
            InputError: fewer than two facts.
            MismatchError: `out` holds a network of other inputs or settings.
        """
        if len(facts) < 2:
            raise InputError(f"{len(facts)} facts to train on; at least two are needed")
        work = working_copy(view)
        state = self._start(view, work, facts, text, Path(out))
        net = state.net
        adam = _Adam(net, self, state)
        rows = _rows(facts, text, self.window)
        for step in range(state.step, self.steps):
            terms = _step(work, net, facts, rows, self, step)
            progress.tell("train-mend", step + 1, self.steps, f"edit {terms[0]:.3f} kept {terms[1]:.4f}")
            adam.step()
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                state = replace(state, step=step + 1, optimiser=adam.tensors())
                state.save(out)
        if not self.steps:
            state.save(out)
        return state

    def _start(self, view: ModelView, work: ModelView, facts: Facts, text: Passages | None, out: Path) -> Trained:
        settings = {key: value for key, value in settings_of(self).items() if key not in ("steps", "save_every")}
        inputs = {"model": view.digest, "facts": facts.digest, **({"text": text.digest} if text else {})}
        provenance = Provenance("mend", settings, self.seed, inputs)
        if out.exists():
            found = Trained.load(out)
            if (found.provenance.inputs, dict(found.provenance.settings)) != (inputs, settings):
                raise MismatchError(f"{out} was trained on other data or with other settings; name another file")
            return found
        last = range(max(0, view.layers - self.last), view.layers)
        sites = [site for site in view.sites(*kinds_named(self.kinds)) if site.layer in last]
        if not sites:
            raise InputError(f"no map of {self.kinds} in the last {self.last} layers")
        for site in sites:
            if site.kind.of_experts and view.experts(site.layer):
                raise ModelError(f"{site}: a mixture's experts, each of which sees its own tokens only; mend learns to "
                                 "edit dense maps (--kinds attn.out)")  # fmt: skip
        sizes = {site: (int(view.weight(site).shape[0]), int(view.weight(site).shape[1])) for site in sites}
        net = Hypernet(sizes, rank=self.rank, alpha=self.alpha, seed=self.seed)
        asked = facts.as_passages("new")
        signals = [signal(work, asked[index : index + 1], sites) for index in range(len(facts))]
        net.learn_spread(signals)
        return Trained(net, 0, provenance, {})


class _Adam:
    """torch's Adam with a state that is saved by name."""

    def __init__(self, net: Hypernet, how: Training, state: Trained) -> None:
        self.net, self.how = net, how
        steps = [entry for name, entry in net.table.items() if name.endswith("/alpha")]
        others = [entry for name, entry in net.table.items() if not name.endswith("/alpha")]
        self.own = torch.optim.Adam([{"params": others, "lr": how.lr}, {"params": steps, "lr": how.alpha_lr}])
        for name, entry in net.table.items():
            if f"{name}|mean" in state.optimiser:
                self.own.state[entry] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": state.optimiser[f"{name}|mean"].clone(),
                    "exp_avg_sq": state.optimiser[f"{name}|square"].clone(),
                }

    def step(self) -> None:
        """One step along the gradients in place, which are cleared."""
        torch.nn.utils.clip_grad_norm_(list(self.net.table.values()), self.how.clip)
        self.own.step()
        self.own.zero_grad(set_to_none=False)

    def tensors(self) -> dict[str, Tensor]:
        """Its state."""
        found: dict[str, Tensor] = {}
        for name, entry in self.net.table.items():
            known: dict[str, Any] = self.own.state.get(entry, {})
            if known:
                found |= {f"{name}|mean": known["exp_avg"].clone(), f"{name}|square": known["exp_avg_sq"].clone()}
        return found


@dataclass(frozen=True)
class _Rows:
    """Rows that should stay: prompts with their present answer, and windows of text."""

    prompts: list[Passage]
    windows: list[Passage]


def _rows(facts: Facts, text: Passages | None, window: int) -> _Rows:
    cut = [(item, item.ids[:window]) for item in text or () if len(item.ids) > 1]
    windows = [Passage(item.id, ids[:1], ids[1:]) for item, ids in cut]
    return _Rows(list(facts.as_passages("true")), windows)


def _step(work: ModelView, net: Hypernet, facts: Facts, rows: _Rows, how: Training, step: int) -> tuple[float, float]:
    """Gradients of one step into the network; both terms."""
    # A generator a step, so that going on from a saved step draws what an uninterrupted run draws.
    draw = torch.Generator().manual_seed((how.seed << 32) + step)
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(how.seed + step // len(facts)))
    fact = facts[int(order[step % len(facts)])]
    asked = Facts((fact,)).as_passages("new", paraphrases=True)
    kept = _kept(fact, rows, how, draw)
    batch = pad([item.ids for item in (*asked, *kept)], [len(item.prefix) for item in (*asked, *kept)],
                device=work.device)  # fmt: skip
    line, _, token, _ = batch.suffix_index()
    told = line < len(asked)
    factors = {site: net(site, entry) for site, entry in signal(work, asked[:1], list(net.sizes)).items()}
    with torch.no_grad():
        before = answered(work, batch)[~told]
    with work.frozen(), torch.enable_grad(), changed(work, factors):
        after = answered(work, batch)
        learnt = -after[told].gather(1, token[told][:, None]).mean()
        moved = (before.exp() * (before - after[~told])).sum(1).mean() if kept else after.new_zeros(())
        (how.edit_weight * learnt + moved).backward()  # type: ignore[no-untyped-call]
    return float(learnt.detach()), float(moved.detach())


def _kept(fact: Fact, rows: _Rows, how: Training, draw: torch.Generator) -> list[Passage]:
    """The fact's neighbours, prompts of others, and windows of text."""
    near = [Passage(f"near-{index}", entry.prompt.ids, entry.target) for index, entry in enumerate(fact.neighbors)]
    others = [item for item in rows.prompts if item.id != fact.id]
    return near + _drawn(others, how.others, draw) + _drawn(rows.windows, how.windows, draw)


def _drawn(items: Sequence[Passage], count: int, draw: torch.Generator) -> list[Passage]:
    return [items[index] for index in torch.randperm(len(items), generator=draw)[:count].tolist()]
