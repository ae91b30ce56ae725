"""The decoder's steps between its matrix products, by PyTorch's own kernels.

Contract: `Operations` is what a decoder needs beside its linear layers; `EagerOperations` runs anywhere.
Must not know layers' order or sampling.

Letters: T new tokens, S cached tokens with the new ones, D hidden, F MLP width, H query heads, G key/value
heads, R = H / G, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from draftloop.backends.torch.native.library import load_library
from draftloop.backends.torch.native.operations import NativeOperations, native_fits

if TYPE_CHECKING:
    from draftloop.backends.architecture import Architecture
    from draftloop.backends.torch.weights import Layer

_ROW_BY_ROW_TOKENS = 16
"""On a CPU so few tokens attend one by one, as they would if they came alone. PyTorch's fused kernel rounds
differently for several rows; with this, verifying gives the very bits of decoding one token at a time, and
greedy speculation the target's own text. It costs one small kernel call a row and layer."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where the new tokens stand: cos and sin [T, 1, E]; mask [R·T, S] bool, None where none is needed."""

    start: int
    end: int
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None


class Operations(Protocol):
    """What happens between the products."""

    @property
    def needs_mask(self) -> bool:
        """Whether `attend` reads the span's mask."""
        ...

    def norm(self, x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """Add `added` [T, D] to the residual stream x [T, D] float32 in place; RMSNorm of it, [T, D]."""
        ...

    def attend(self, layer: Layer, qkv: torch.Tensor, values: torch.Tensor, span: Span) -> torch.Tensor:
        """Rotate, append to the cache's layer [2, G, max_tokens, E], attend: [T, (H + 2G)·E] -> [T, H·E]."""
        ...

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up: [T, 2F] -> [T, F]."""
        ...


def operations_for(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Operations:
    """The fastest that this device has for these shapes."""
    if device.type == "cpu" and dtype is torch.bfloat16 and native_fits(architecture):
        library = load_library(torch.get_num_threads())
        if library is not None:
            return NativeOperations(library, architecture)
    return EagerOperations(architecture, dtype)


@dataclass(frozen=True, slots=True)
class EagerOperations:
    """See `Operations`."""

    architecture: Architecture
    dtype: torch.dtype

    needs_mask = True

    def norm(self, x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        if added is not None:
            x += added
        return rms_norm(x, weight.shape, weight, self.architecture.rms_norm_eps).to(self.dtype)

    def attend(self, layer: Layer, qkv: torch.Tensor, values: torch.Tensor, span: Span) -> torch.Tensor:
        """Grouped-query attention (Ainslie et al. 2023): the R queries of a group are rows of one product."""
        heads, groups = self.architecture.num_heads, self.architecture.num_kv_heads
        width, count = self.architecture.head_dim, len(qkv)
        qk, v = qkv.view(count, heads + 2 * groups, width).split((heads + groups, groups), dim=1)
        qk = rotate(self._head_norms(layer, qk.float()), span.cos, span.sin).to(self.dtype)
        q, k = qk.split((heads, groups), dim=1)
        values[0, :, span.start : span.end] = k.transpose(0, 1)
        values[1, :, span.start : span.end] = v.transpose(0, 1)
        # Head h = group·R + r.
        q = q.reshape(count, groups, -1, width)
        if count <= _ROW_BY_ROW_TOKENS and not qkv.is_cuda:
            ends = range(span.start + 1, span.end + 1)
            attended = torch.cat([_attend(row[None], values, end) for row, end in zip(q, ends, strict=True)])
        else:
            attended = _attend(q, values, span.end, span.mask)
        return attended.reshape(count, heads * width)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def _head_norms(self, layer: Layer, qk: torch.Tensor) -> torch.Tensor:
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        heads, eps = self.architecture.num_heads, self.architecture.rms_norm_eps
        q = rms_norm(qk[:, :heads], layer.q_norm.shape, layer.q_norm, eps)
        k = rms_norm(qk[:, heads:], layer.k_norm.shape, layer.k_norm, eps)
        return torch.cat((q, k), dim=1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split (Su et al. 2021): x [T, heads, E], cos and sin [T, 1, E]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _attend(
    q: torch.Tensor, values: torch.Tensor, end: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Queries [T, G, R, E] over the first `end` keys and values [2, G, max_tokens, E] -> [T, G, R, E]."""
    count, groups, _, width = q.shape
    rows = q.permute(1, 2, 0, 3).reshape(groups, -1, width)
    attended = scaled_dot_product_attention(
        rows[None], values[None, 0, :, :end], values[None, 1, :, :end], attn_mask=mask
    )
    return attended.view(groups, -1, count, width).permute(2, 0, 1, 3)
