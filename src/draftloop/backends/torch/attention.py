"""Causal attention of a text or of its end, differentiable.

Contract: grouped-query attention (Ainslie et al. 2023) with no cache. Must not know layers.

Letters: T tokens that attend, S those that are seen, of which the T are the last; H query heads, G key/value
heads, R = H / G, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_SHORT_TOKENS = 512
"""Up to here a CPU multiplies whole matrices: PyTorch's fused kernel took three times as long at 160 tokens,
half as long again at 512, its backward pass most of it. The probabilities that are kept grow with T²."""


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Q [T, H, E], k and v [S, G, E] -> [T, H·E]; query t sees the first S - T + t + 1."""
    if q.device.type == "cpu" and len(k) <= _SHORT_TOKENS:
        y: torch.Tensor = _Short.apply(q, k, v)  # type: ignore[no-untyped-call]
        return y
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    whole = len(q) == len(k)
    seen = (
        None if whole else torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    )
    attended = scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, is_causal=whole, enable_gqa=True
    )
    return attended[0].transpose(0, 1).reshape(len(q), -1)


class _Short(torch.autograd.Function):
    """The R queries of a group are rows of one product; softmax in float32."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        (seen, groups, width), count = k.shape, len(q)
        rows, keys, values = _by_group(q * width**-0.5, groups), k.transpose(0, 1), v.transpose(0, 1)
        scores = torch.bmm(rows, keys.transpose(1, 2)).float().view(groups, -1, count, seen)
        future = torch.full((count, seen), -torch.inf, device=q.device).triu_(1 + seen - count)
        probs = torch.softmax(scores.add_(future), dim=-1).to(q.dtype).view(groups, -1, seen)
        ctx.save_for_backward(rows, keys, values, probs)
        return _by_token(torch.bmm(probs, values), count).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, keys, values, probs = ctx.saved_tensors
        groups, width, count = len(keys), keys.shape[2], len(gradients[0])
        g = _by_group(gradients[0].view(count, -1, width), groups)
        for_values = torch.bmm(probs.transpose(1, 2), g)
        for_probs = torch.bmm(g, values.transpose(1, 2)).float()
        # Softmax's gradient: p (g - Σ p g). What is masked has p = 0.
        wide = probs.float()
        for_scores = for_probs.sub_((for_probs * wide).sum(dim=-1, keepdim=True)).mul_(wide).to(rows.dtype)
        for_rows = torch.bmm(for_scores, keys).mul_(width**-0.5)
        for_keys = torch.bmm(for_scores.transpose(1, 2), rows)
        return _by_token(for_rows, count), for_keys.transpose(0, 1), for_values.transpose(0, 1)


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[T, H, E] -> [G, R·T, E]; head h = group·R + r."""
    count, _, width = x.shape
    return x.reshape(count, groups, -1, width).permute(1, 2, 0, 3).reshape(groups, -1, width)


def _by_token(x: torch.Tensor, count: int) -> torch.Tensor:
    """[G, R·T, E] -> [T, H, E]."""
    groups, _, width = x.shape
    return x.view(groups, -1, count, width).permute(2, 0, 1, 3).reshape(count, -1, width)
