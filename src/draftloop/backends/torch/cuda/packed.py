"""4-bit weights in the order in which `products.cu` reads them: loads are whole, codes stay as they are.

Contract: as `torch/linear.py`: [T, in] bfloat16 -> [T, out] bfloat16. The kernels multiply a few rows; more
(a prompt) are multiplied with rows that were unpacked for that call. Must not know steps.

Sixteen outputs by 64 inputs are one block of 32 · 4 words. Output g + 8 · lower and input 32 · half + 8 · q +
4 · step + 2 · pair + odd stand in lane 4 · g + q, word 2 · half + step, nibble lower + 2 · pair + 4 · odd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.cuda import products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.torch.linear import AffineWeight, Linear

_PACK_ROWS = 8192
"""Rows whose codes are taken apart at a time: a byte each."""
_GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class PackedInt4Linear:
    """words: [out / 16, in / 64, 32, 4] int32; pairs: a group's scale and bias in each int32; bias: [out]."""

    words: torch.Tensor
    pairs: torch.Tensor
    group_size: int
    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        if len(x) > products.MAX_ROWS:
            return torch.nn.functional.linear(x, products.unpacked(self.matrix), self.bias)
        y = products.plain(self.matrix, products.Rows(x.contiguous()))
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    @property
    def matrix(self) -> products.Matrix:
        """What the kernels take."""
        return products.Matrix(self.words, self.pairs, self.group_size, self.out_features, self.in_features)

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        return self.words.nbytes + self.pairs.nbytes


def packed_int4_linear(
    parts: Sequence[AffineWeight], bias: torch.Tensor | None, group_size: int, device: torch.device
) -> Linear | None:
    """Stack the rows of `parts` in the kernels' order; None where their shape or this device does not fit."""
    width = parts[0].weight.shape[1] * 8
    if group_size not in _GROUPS or width % max(group_size, products.BLOCK) or not products.usable(device):
        return None
    words = torch.cat([part.weight for part in parts])
    scales, biases = (torch.cat([getattr(part, name) for part in parts]) for name in ("scales", "biases"))
    pairs = torch.stack((scales, biases), dim=-1).to(device, torch.bfloat16).view(torch.int32).squeeze(-1)
    blocks = [packed_words(rows.to(device)) for rows in words.split(_PACK_ROWS)]
    return PackedInt4Linear(
        words=torch.cat(blocks),
        pairs=packed_pairs(pairs, group_size),
        group_size=group_size,
        in_features=width,
        out_features=len(words),
        bias=bias,
    )


def packed_words(words: torch.Tensor) -> torch.Tensor:
    """[N, in / 8] words as MLX has them -> [N / 16, in / 64, 32, 4], rows that are not there are zero."""
    nibbles = _whole_tiles(words.contiguous()).view(torch.uint8)
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(1)
    tiles, blocks = len(codes) // products.TILE, codes.shape[1] // products.BLOCK
    # tile, lower, g, block, half, q, step, pair, odd
    parts = codes.view(tiles, 2, 8, blocks, 2, 4, 2, 2, 2)
    ordered = parts.permute(0, 3, 2, 5, 4, 6, 8, 7, 1).reshape(tiles, blocks, 32, 4, 8)
    bytes_of = ordered[..., ::2] | ordered[..., 1::2] << 4
    return bytes_of.contiguous().view(torch.int32).squeeze(-1)


def packed_pairs(pairs: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, groups] -> [N / 16, groups / c, 8, c, 2]: what a lane needs is together, c groups of a block."""
    together = max(1, products.BLOCK // group_size)
    whole = _whole_tiles(pairs)
    parts = whole.view(len(whole) // products.TILE, 2, 8, -1, together)
    return parts.permute(0, 3, 2, 4, 1).contiguous()


def _whole_tiles(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % products.TILE))
