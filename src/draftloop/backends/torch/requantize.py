"""Rounding a changed weight back to 4 bits, in the checkpoint's groups.

Contract: an MLX affine weight and a change of it in, an affine weight of the same layout out. Must not know
what changed it.
"""

from __future__ import annotations

import torch

from draftloop.backends.torch.linear import AffineWeight, dequantize, pack_codes

MAX_CODE = 15
_SHRINKS = (1.0, 0.95, 0.9, 0.85)
"""Shares of a group's range that the search tries: clipping an outlier may serve the other weights."""


def shifted(weight: AffineWeight, delta: torch.Tensor) -> AffineWeight:
    """The 4-bit weight nearest to `weight` + `delta` [out, in] float32, group by group.

    The checkpoint's own scale and bias are tried first, then the group's range at several widths; the
    smallest squared error wins.
    """
    out, groups = weight.scales.shape
    wanted = (dequantize(weight, torch.float32) + delta).view(out, groups, -1)
    low, high = wanted.amin(dim=-1), wanted.amax(dim=-1)
    best_scale, best_bias = weight.scales.float(), weight.biases.float()
    best_codes = _codes(wanted, best_scale, best_bias)
    best_error = _error(wanted, best_codes, best_scale, best_bias)
    for shrink in _SHRINKS:
        scale = ((high - low) * (shrink / MAX_CODE)).to(weight.scales.dtype).float()
        bias = ((low + high - (high - low) * shrink) / 2).to(weight.biases.dtype).float()
        codes = _codes(wanted, scale, bias)
        error = _error(wanted, codes, scale, bias)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_bias = torch.where(better, scale, best_scale), torch.where(better, bias, best_bias)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
    return AffineWeight(
        pack_codes(best_codes.view(out, -1).to(torch.uint8)),
        best_scale.to(weight.scales.dtype),
        best_bias.to(weight.biases.dtype),
    )


def _codes(wanted: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # A group of equal weights has scale 0: its codes mean nothing.
    steps = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    return ((wanted - bias.unsqueeze(-1)) / steps).round_().clamp_(0, MAX_CODE)


def _error(
    wanted: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return (codes * scale.unsqueeze(-1) + bias.unsqueeze(-1) - wanted).square().sum(dim=-1)
