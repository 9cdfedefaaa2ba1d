"""What a model writes by itself: greedy or sampled, token by token on cached keys and values.

transformers' own `generate` obeys the checkpoint's end token, penalties and bans; here the model alone decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memloc.view import ModelView


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        ids: [n, t] the given tokens and what followed.
        hidden: [n, t - 1, d] after the final norm, at every position but the last: what `view.unembed` turns into
            the distribution the next token was drawn from.
    """

    ids: Tensor
    hidden: Tensor


@torch.no_grad()
def continuation(
    view: ModelView,
    ids: Tensor,
    length: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Continuation:
    """Let the model continue rows of equal length.

    Args:
        view: the model.
        ids: [n, s] long.
        length: how many tokens to add.
        temperature: 0 is greedy (lowest id among equals).
        top_k: each token is drawn from the k likeliest (and those that tie with the last of them).
        generator: on any device; needed where the temperature is not 0.

    Cost: one forward over s tokens, then one a token, with cached keys and values.
    """
    view.need_causal("continues nothing")
    base: Any = getattr(view.model, view.model.base_model_prefix)
    written, hidden, cache = [ids], [], None
    real = torch.ones(len(ids), ids.shape[1] + length, dtype=torch.long, device=ids.device)
    for done in range(length):
        seen = real[:, : ids.shape[1] + done]
        out = base(input_ids=written[-1], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        hidden.append(out.last_hidden_state)
        logits = view.unembed(out.last_hidden_state[:, -1])
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if temperature > 0:
            written.append(_draw(logits / temperature, generator))
        else:
            written.append(logits.argmax(-1, keepdim=True))
    return Continuation(torch.cat(written, 1), torch.cat(hidden, 1))


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row, `[n, 1]`, by inverting the cumulative distribution: one random number a row, not one a token."""
    total = logits.double().softmax(-1).cumsum(-1)
    device = logits.device if generator is None else generator.device
    drawn = torch.rand(len(logits), 1, generator=generator, device=device, dtype=torch.float64)
    height = drawn.to(total.device) * total[:, -1:]
    return torch.searchsorted(total, height, right=True).clamp_(max=logits.shape[-1] - 1)
