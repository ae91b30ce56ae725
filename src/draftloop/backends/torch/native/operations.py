"""The decoder's steps between the products, by the C kernels.

Contract: as `torch/operations.py`, for bfloat16 activations on a CPU. Each row is computed by itself, so its
bits do not depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import ctypes

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.torch.operations import Span
    from draftloop.backends.torch.weights import Layer

MAX_HEAD_DIM = 512


def native_fits(architecture: Architecture) -> bool:
    """Whether the kernels take these shapes: whole registers."""
    widths = (architecture.hidden_size, architecture.intermediate_size)
    head = architecture.head_dim
    return all(width % 16 == 0 for width in widths) and head % 32 == 0 and head <= MAX_HEAD_DIM


@dataclass(frozen=True, slots=True)
class NativeOperations:
    """See `Operations`."""

    library: ctypes.CDLL
    architecture: Architecture

    needs_mask = False

    def norm(self, x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        added = None if added is None else added.contiguous()
        other = None if added is None else added.data_ptr()
        self.library.dl_norm(
            x.data_ptr(), other, weight.data_ptr(), y.data_ptr(), *x.shape, self.architecture.rms_norm_eps
        )
        return y

    def attend(self, layer: Layer, qkv: torch.Tensor, values: torch.Tensor, span: Span) -> torch.Tensor:
        """See `Operations`."""
        shapes, count, qkv = self.architecture, len(qkv), qkv.contiguous()
        y = torch.empty(count, shapes.num_heads * shapes.head_dim, dtype=torch.bfloat16)
        queries = torch.empty(y.shape, dtype=torch.float32)
        self.library.dl_attend(
            qkv.data_ptr(),
            span.cos.data_ptr(),
            span.sin.data_ptr(),
            None if layer.q_norm is None else layer.q_norm.data_ptr(),
            None if layer.k_norm is None else layer.k_norm.data_ptr(),
            values[0].data_ptr(),
            values[1].data_ptr(),
            y.data_ptr(),
            queries.data_ptr(),
            count,
            span.start,
            shapes.num_heads,
            shapes.num_kv_heads,
            shapes.head_dim,
            values.shape[2],
            shapes.rms_norm_eps,
        )
        return y

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        y = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=torch.bfloat16)
        gate_up = gate_up.contiguous()
        self.library.dl_gate(gate_up.data_ptr(), y.data_ptr(), *y.shape)
        return y
