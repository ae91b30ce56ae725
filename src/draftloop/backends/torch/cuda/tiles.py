"""How a matrix product is cut into programs, by its shape alone: found by trying them on an H100.

Contract: the cut never depends on the number of rows, on which a row's rounding would then depend too.
"""

from __future__ import annotations

from dataclasses import dataclass

_MANY_OUTPUTS = 16384
_FEW_OUTPUTS = 1536
_WIDE = 4096


@dataclass(frozen=True, slots=True)
class Tiles:
    """Outputs of one program, inputs of one step of its loop, splits at most, warps, steps loaded ahead."""

    outputs: int
    width: int
    splits: int
    warps: int
    stages: int

    def share(self, width: int) -> int:
        """Inputs of one split."""
        steps = -(-width // self.width)
        return -(-steps // self.splits) * self.width


def tiles_of(outputs: int, width: int, *, gated: bool) -> Tiles:
    """The cut of a product with [outputs, width] weights; `gated`: with twice as many, unsplit.

    Small products are split along their inputs too, so that some 250 programs keep 132 multiprocessors busy.
    """
    if gated:
        return Tiles(outputs=32, width=128, splits=1, warps=4, stages=4)
    if outputs > _MANY_OUTPUTS:
        return Tiles(outputs=64, width=128, splits=1, warps=2, stages=3)
    splits = 4 if outputs < _FEW_OUTPUTS or width > _WIDE else 2
    return Tiles(
        outputs=16 if outputs < 2 * _FEW_OUTPUTS else 32, width=128, splits=splits, warps=2, stages=5
    )
