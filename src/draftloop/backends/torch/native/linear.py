"""4-bit linear layers that the C kernels multiply: eight tokens read the weights once.

Contract: as `torch/linear.py`: [T, in] bfloat16 -> [T, out] bfloat16. An MLX affine weight is only put in
another order, no code is unpacked. Activations are rounded to 16 bits in the weights' groups, finer than
the bfloat16 they come in.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.torch.linear import AffineWeight

BLOCK_ROWS = 16
"""Rows that stand interleaved, one to a lane of a register."""
_RANKS = 4
"""An adapter's ranks are filled up to a multiple of so many (`RANKS` of `products.c`)."""
_PACK_BLOCKS = 512
"""Blocks that are put in order at a time."""


class _Layer(ctypes.Structure):
    """`Layer` of `products.c`: made once, so that a call passes four numbers."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("group", ctypes.c_long),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("first_rank", ctypes.c_void_p),
        ("ranks", ctypes.c_long),
        ("span", ctypes.c_long),
    )


@dataclass(frozen=True, slots=True)
class NativeAdapter:
    """What stands beside a product, x · a · b, in the kernel's order.

    a: [R / 4, in / 16, 4, 16] bfloat16, four ranks side by side; b: [out / 16, span, 16] bfloat16, the ranks
    that each block of outputs depends on, which begin with first [out / 16] int32: where modules are stacked,
    most of b is zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    first: torch.Tensor


class NativeInt4Linear:
    """A 4-bit layer, and the adapter beside it if there is one: one pass over the weights, rounded once.

    Args:
        library: the kernels.
        blocks: [out / 16, in / group, group / 8 + 1, 16] int32 (see `products.c`).
        bias: [out] bfloat16 or None.
        group_size: inputs that share a scale.
        out_features: outputs; the last block may be filled up.
        adapter: beside it, or None.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        blocks: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        group_size: int,
        out_features: int,
        adapter: NativeAdapter | None = None,
    ) -> None:
        self._library, self._blocks, self._bias, self._adapter = library, blocks, bias, adapter
        self._layer = _Layer(
            weights=blocks.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            inputs=blocks.shape[1] * group_size,
            outputs=out_features,
            group=group_size,
        )
        if adapter is not None:
            self._layer.a, self._layer.b = adapter.a.data_ptr(), adapter.b.data_ptr()
            self._layer.first_rank = adapter.first.data_ptr()
            self._layer.ranks, self._layer.span = len(adapter.a) * _RANKS, adapter.b.shape[1]
        self._multiply, self._address = library.dl_multiply, ctypes.addressof(self._layer)
        self._out_features = out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`.

        Raises:
            MemoryError: there is none for the rounded inputs.
        """
        x, count = x.contiguous(), len(x)
        y = torch.empty(count, self._out_features, dtype=torch.bfloat16)
        if not self._multiply(self._address, x.data_ptr(), y.data_ptr(), count):
            raise MemoryError(f"no memory to multiply {count} rows")
        return y

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        beside = self._adapter
        adapter_bytes = 0 if beside is None else beside.a.nbytes + beside.b.nbytes + beside.first.nbytes
        return self._blocks.nbytes + adapter_bytes

    def with_adapter(self, a: torch.Tensor, b: torch.Tensor) -> NativeInt4Linear | None:
        """Put a [in, R] and b [R, out], scaled, beside it; None where the outputs fill no whole registers."""
        if a.dtype is not torch.bfloat16 or b.shape[1] % BLOCK_ROWS:
            return None
        ranks = len(b)
        blocks = b.view(ranks, -1, BLOCK_ROWS).transpose(0, 1)
        used = (blocks != 0).any(dim=-1).int()
        begin = used.argmax(dim=1)
        span = int((ranks - used.flip(1).argmax(dim=1) - begin).where(used.any(dim=1), 1).max())
        first = begin.clamp(max=ranks - span)
        rows = (first.unsqueeze(1) + torch.arange(span)).unsqueeze(-1).expand(-1, -1, BLOCK_ROWS)
        whole = torch.nn.functional.pad(a.T, (0, 0, 0, -ranks % _RANKS))
        by_task = whole.reshape(-1, _RANKS, len(a) // BLOCK_ROWS, BLOCK_ROWS).transpose(1, 2).contiguous()
        adapter = NativeAdapter(by_task, blocks.gather(1, rows).contiguous(), first.to(torch.int32))
        return NativeInt4Linear(
            self._library,
            self._blocks,
            self._bias,
            group_size=self._layer.group,
            out_features=self._out_features,
            adapter=adapter,
        )


def native_int4_linear(
    library: ctypes.CDLL, parts: Sequence[AffineWeight], bias: torch.Tensor | None, group_size: int
) -> NativeInt4Linear:
    """Stack the rows of `parts` in the kernel's order."""
    words = torch.cat([part.weight for part in parts])
    pairs = [torch.cat([getattr(part, name) for part in parts]) for name in ("scales", "biases")]
    rows, columns = len(words), words.shape[1] * 8
    groups = columns // group_size
    blocks = torch.empty(-(-rows // BLOCK_ROWS), groups, group_size // 8 + 1, BLOCK_ROWS, dtype=torch.int32)
    step = _PACK_BLOCKS * BLOCK_ROWS
    for first in range(0, rows, step):
        to = blocks[first // BLOCK_ROWS : (first + step) // BLOCK_ROWS]
        codes = _by_lane(words[first : first + step].contiguous().view(torch.int32), len(to))
        to[:, :, :-1] = codes.view(len(to), groups, -1, BLOCK_ROWS)
        halves = [_by_lane(pair[first : first + step].to(torch.bfloat16), len(to)) for pair in pairs]
        to[:, :, -1] = torch.cat(halves, dim=-1).view(torch.int32)
    return NativeInt4Linear(library, blocks, bias, group_size=group_size, out_features=rows)


def native_unpack(library: ctypes.CDLL, part: AffineWeight, rows: torch.Tensor) -> None:
    """Write the dense values of `part` into rows [N, in] bfloat16, rounded once."""
    words, scales, biases = part.weight.contiguous(), part.scales.float(), part.biases.float()
    group = rows.shape[1] // scales.shape[1]
    pointers = (tensor.data_ptr() for tensor in (words, scales, biases, rows))
    library.dl_unpack(*pointers, *rows.shape, group)


def _by_lane(rows: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """[N, C] -> [blocks, C, 16], rows that are not there are zero."""
    missing = num_blocks * BLOCK_ROWS - len(rows)
    if missing:
        rows = torch.cat((rows, rows.new_zeros(missing, rows.shape[1])))
    return rows.view(num_blocks, BLOCK_ROWS, -1).transpose(1, 2).contiguous()
