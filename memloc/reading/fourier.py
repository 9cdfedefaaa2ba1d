"""Spectra over tokens in cyclic order: how far a reading or a writing is one wave, by its inverse participation ratio.

Two conventions, because they give other numbers for the same wave. "half" takes the real transform's frequencies
0 .. n/2, so a pure cosine has 1; "full" takes all n, of which a cosine fills two, so it has 1/2. White noise has about
4/n and 2/n. The reference code of the paper takes "half"; the range [1/n, 1] it states fits "full".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Convention = Literal["half", "full"]


def power(series: Tensor, convention: Convention = "half", *, centred: bool = False) -> Tensor:
    """Power at each frequency, of series [..., n]: [..., n // 2 + 1] or [..., n].

    Args:
        series: one value a token, in cyclic order, in the last dimension.
        convention: which frequencies are kept; see the module.
        centred: take the mean away first, so that a constant is no wave.
    """
    if centred:
        series = series - series.mean(-1, keepdim=True)
    found = torch.fft.rfft(series) if convention == "half" else torch.fft.fft(series)
    size: Tensor = found.abs().square()
    return size


def participation(series: Tensor, convention: Convention = "half", *, centred: bool = False) -> Tensor:
    """Inverse participation ratio Σ|x̃|⁴ / (Σ|x̃|²)² of series [..., n]: [...], between 0 and 1; 0 where all is zero.

    Source: Doshi et al. 2023, arXiv:2310.13061.
    """
    found = power(series, convention, centred=centred)
    whole = found.sum(-1)
    ratio = found.square().sum(-1) / whole.square()
    return torch.where(whole > 0, ratio, torch.zeros_like(ratio))


def one_wave(series: Tensor, frequency: Tensor) -> Tensor:
    """Series [..., n] with one frequency kept, each its own: `frequency` [...], of 0 .. n // 2."""
    spectrum = torch.fft.rfft(series)
    keep = torch.arange(spectrum.shape[-1], device=series.device) == frequency[..., None]
    back: Tensor = torch.fft.irfft(spectrum * keep, n=series.shape[-1])
    return back
