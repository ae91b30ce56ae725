"""4-bit linear layers that the C kernels multiply: eight tokens read the weights once.

Contract: as `torch/linear.py`: [T, in] bfloat16 -> [T, out] bfloat16. An MLX affine weight is only put in
another order, no code is unpacked. Activations are rounded to 16 bits in the weights' groups, finer than
the bfloat16 they come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Sequence

    from draftloop.backends.torch.linear import AffineWeight

BLOCK_ROWS = 16
"""Rows that stand interleaved, one to a lane of a register."""
_RANKS = 4
"""An adapter's ranks are filled up to a multiple of so many (`RANKS` of `products.c`)."""
_PACK_BLOCKS = 512
"""Blocks that are put in order at a time."""


@dataclass(frozen=True, slots=True)
class NativeInt4Linear:
    """blocks: [out / 16, in / group, group / 8 + 1, 16] int32 (see `products.c`); bias: [out] or None."""

    library: ctypes.CDLL
    blocks: torch.Tensor
    group_size: int
    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        x, y, scratch = self._operands(x)
        self.library.dl_int4(*self._arguments(x, y, scratch))
        return y

    def adapted(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The product with what `NativeAdaptedLinear` adds, rounded once."""
        x, y, scratch = self._operands(x)
        ranks = len(a) * _RANKS
        inner = torch.empty(len(x), ranks)
        pointers = (tensor.data_ptr() for tensor in (a, b, first, inner))
        self.library.dl_int4_adapted(*self._arguments(x, y, scratch), *pointers, ranks, b.shape[1])
        return y

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs as the kernel reads them, its outputs, its scratch."""
        y = torch.empty(len(x), self.out_features, dtype=torch.bfloat16)
        width = 2 * self.in_features + 8 * (self.in_features // self.group_size)
        return x.contiguous(), y, torch.empty(len(x) * width, dtype=torch.uint8)

    def _arguments(self, x: torch.Tensor, y: torch.Tensor, scratch: torch.Tensor) -> tuple[int | None, ...]:
        return (
            self.blocks.data_ptr(),
            x.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            len(x),
            self.in_features,
            self.out_features,
            self.group_size,
        )

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        return self.blocks.nbytes


@dataclass(frozen=True, slots=True)
class NativeAdaptedLinear:
    """base(x) + x · a · b in one pass over the weights.

    a: [R / 4, in / 16, 4, 16] bfloat16, four ranks side by side; b: [out / 16, span, 16] bfloat16, the ranks
    that each block of outputs depends on, which begin with first [out / 16] int32: where modules are stacked,
    most of b is zero.
    """

    base: NativeInt4Linear
    a: torch.Tensor
    b: torch.Tensor
    first: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return self.base.adapted(x, self.a, self.b, self.first)

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        return self.base.num_bytes + self.a.nbytes + self.b.nbytes + self.first.nbytes


def native_adapted_linear(
    base: NativeInt4Linear, a: torch.Tensor, b: torch.Tensor
) -> NativeAdaptedLinear | None:
    """Put a [in, R] and b [R, out] beside `base`; None where the outputs do not fill whole registers."""
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
    return NativeAdaptedLinear(base, by_task, blocks.gather(1, rows).contiguous(), first.to(torch.int32))


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
    return NativeInt4Linear(library, blocks, group_size, columns, rows, bias)


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
