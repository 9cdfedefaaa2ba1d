"""Unlearning objectives as pure functions of log-probabilities: what each row adds to the loss, to be made small.

Rows are sequences, and padding never counts: `logs` holds the log-probability of every suffix token and `counted` says
which entries are tokens. All are `[n]`, differentiable, and means or sums within the row only, so that a row's loss
does not depend on its neighbours in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def row_sum(logs: Tensor, counted: Tensor) -> Tensor:
    """Σ_t log p of each row, `[n]` nats; `logs` and `counted` are `[n, s]`."""
    return torch.where(counted, logs, logs.new_zeros(())).sum(1)


def row_mean(logs: Tensor, counted: Tensor) -> Tensor:
    """Mean log p per token of each row, `[n]` nats."""
    return row_sum(logs, counted) / counted.sum(1)


def ascent(logs: Tensor, counted: Tensor) -> Tensor:
    """Gradient ascent on the suffix: its mean log p per token (so -NLL), unbounded below.

    Source: Jang et al. 2023, arXiv:2210.01504; Maini et al. 2024, arXiv:2401.06121.
    """
    return row_mean(logs, counted)


def npo(logs: Tensor, counted: Tensor, reference: Tensor, *, beta: float | Tensor) -> Tensor:
    """Negative preference: (2/β) · log(1 + (p / p_ref)^β), with p the probability of the whole suffix.

    Its gradient is that of β-scaled ascent times 2 / (1 + (p_ref / p)^β), so it fades once p is far below p_ref;
    β → 0 gives ascent back.

    Args:
        logs: `[n, s]` nats.
        counted: `[n, s]` bool.
        reference: `[n]` summed log p of the original model, computed once.
        beta: inverse temperature, per nat of the summed log-ratio; of each row, where it is `[n]`.

    Source: Zhang et al. 2024, arXiv:2404.05868.
    """
    return 2 / beta * softplus(beta * (row_sum(logs, counted) - reference))


def simnpo(logs: Tensor, counted: Tensor, *, beta: float, delta: float) -> Tensor:
    """NPO by length instead of by a reference: -(2/β) · log σ(β · (NLL / T - δ)).

    The margin δ is per token and inside, in nats.

    Args:
        logs: `[n, s]` nats.
        counted: `[n, s]` bool.
        beta: inverse temperature, per nat per token.
        delta: nats per token that the mean NLL should exceed.

    Source: Fan et al. 2024, arXiv:2410.07163.
    """
    return 2 / beta * softplus(beta * (row_mean(logs, counted) + delta))


def misdirection(hidden: Tensor, counted: Tensor, towards: Tensor) -> Tensor:
    """Mean over counted positions of ‖h - towards‖² / d, each row's `[n]`.

    Args:
        hidden: `[n, t, d]` activations.
        counted: `[n, t]` bool.
        towards: `[d]`, or `[n, t, d]` (what the activations were).

    Source: Li et al. 2024, arXiv:2403.03218 (RMU).
    """
    far = (hidden - towards).square().mean(-1)
    return row_sum(far, counted) / counted.sum(1)
