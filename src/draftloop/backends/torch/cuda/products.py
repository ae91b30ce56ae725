"""Products of a few rows with a layer's weights, and what is done to their results in the same launch.

Contract: the host's side of `products.cu`. Each function is one launch that a CUDA graph can record, and
gives a row the same bits whatever its neighbours. Rows are bfloat16, weights too or in 4 bits (`packed.py`).
Must not know layers.

Letters: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import logging
import os
from ctypes import c_float, c_int, c_longlong
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

from draftloop.backends.torch.cuda.driver import CudaError, Kernel, compiled
from draftloop.backends.torch.native.library import SWITCH

CHUNK_ROWS = 16
"""Rows that a program multiplies at once; more of them are its next chunk, or another program's."""
MAX_ROWS = 128
"""More are multiplied faster by rows that were unpacked for that call."""
TILE = 16
"""Outputs that one tensor-core instruction gives."""
BLOCK = 64
"""Inputs that a warp multiplies at a time."""

SOURCE = Path(__file__).with_name("products.cu")
_AMPERE = (8, 0)
_THREADS = 256
_MANY_TILES = 512
_FEW_OUTPUTS = 2048
"""So few leave multiprocessors without a program, so that each program needs many warps."""
_WIDE = 4096
"""So many inputs keep the GPU busy with one tile of outputs a warp."""
_SHARED_WARPS = 16
"""Products with so many warps have few programs: chunks of their own would come one wave after another."""

logger = logging.getLogger(__name__)


class Epilogue(IntEnum):
    """What becomes of a product; the kernel's own numbers."""

    PLAIN = 0
    GATED = 1
    RESIDUAL = 2


@dataclass(frozen=True, slots=True)
class Matrix:
    """weight: [N, K] bfloat16, or words in `packed.py`'s order with their scales and biases in `pairs`.

    `group_size` is that of the codes, 0 for bfloat16. `outputs` is N and may be less than whole tiles hold.
    """

    weight: torch.Tensor
    pairs: torch.Tensor | None
    group_size: int
    outputs: int
    width: int


@dataclass(frozen=True, slots=True)
class Rows:
    """values: [T, K] bfloat16. With `squares` [T, P] they lack a factor: rsqrt(Σ squares / K + eps)."""

    values: torch.Tensor
    squares: torch.Tensor | None = None
    eps: float = 0.0

    def normed(self) -> torch.Tensor:
        """The values with their factor, for what does not apply it by itself."""
        if self.squares is None:
            return self.values
        mean = self.squares.sum(dim=1, keepdim=True) / self.values.shape[1]
        return (self.values.float() * torch.rsqrt(mean + self.eps)).to(self.values.dtype)


@dataclass(frozen=True, slots=True)
class Cut:
    """Tiles that a warp multiplies at once, warps that share their inputs, blocks asked for ahead.

    `chunks` are multiplied by one program; a multiprocessor has to have room for so many `programs`. A row's
    bits depend on `warps` alone, among which its sum is divided.
    """

    tiles: int
    warps: int
    ahead: int
    chunks: int = 1
    programs: int = 1

    def with_rows(self, count: int) -> Cut:
        """The same sums where there are so many rows."""
        if self.warps == _SHARED_WARPS and count > 2 * CHUNK_ROWS:
            return replace(self, ahead=1, chunks=2)
        return self


def cut_of(matrix: Matrix, epilogue: Epilogue) -> Cut:
    """How a product is cut into programs, by its shape alone: found by trying on an H100.

    The number of rows is no part of it: a row's rounding would then depend on it too.
    """
    many = matrix.outputs > _MANY_TILES * TILE
    if epilogue is Epilogue.GATED:
        return Cut(tiles=2, warps=8, ahead=1)
    if many and matrix.group_size:
        return Cut(tiles=4, warps=4, ahead=1, programs=3)
    if matrix.group_size and matrix.width > _WIDE and matrix.outputs <= _FEW_OUTPUTS:
        return Cut(tiles=1, warps=28, ahead=1)
    return Cut(tiles=1 if matrix.width > _WIDE else 2, warps=16, ahead=2)


@dataclass(frozen=True, slots=True)
class Variant:
    """What the source is compiled for; see the head of `products.cu`."""

    codes: int
    cut: Cut
    epilogue: Epilogue = Epilogue.PLAIN
    columns: int = 1
    scaled: bool = False

    @property
    def macros(self) -> dict[str, int]:
        """By the source's names."""
        return {
            "CODES": self.codes,
            "TILES": self.cut.tiles,
            "WARPS": self.cut.warps,
            "AHEAD": self.cut.ahead,
            "COLUMNS": self.columns,
            "CHUNKS": self.cut.chunks,
            "PROGRAMS": self.cut.programs,
            "EPILOGUE": int(self.epilogue),
            "SCALED": int(self.scaled),
        }


@cache
def usable(device: torch.device) -> bool:
    """Whether this device and what is installed can compile and load the kernels."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "0":
        return False
    if torch.cuda.get_device_capability(device) < _AMPERE:
        return False
    try:
        _kernel("multiply", Variant(0, Cut(tiles=1, warps=8, ahead=2)))
    except CudaError as error:
        logger.warning("our own products cannot be used on this GPU, slower ones do the work: %s", error)
        return False
    return True


def fits(weight: torch.Tensor) -> bool:
    """Whether a dense [N, K] weight can be multiplied here."""
    outputs, width = weight.shape
    whole = outputs % TILE == 0 and width % BLOCK == 0 and weight.is_contiguous()
    return weight.dtype is torch.bfloat16 and whole and usable(weight.device)


def plain(matrix: Matrix, rows: Rows) -> torch.Tensor:
    """[T, N] float32."""
    y = rows.values.new_empty(len(rows.values), matrix.outputs, dtype=torch.float32)
    multiply(matrix, rows, y, epilogue=Epilogue.PLAIN, cut=cut_of(matrix, Epilogue.PLAIN))
    return y


def gated(matrix: Matrix, rows: Rows) -> torch.Tensor:
    """silu(first half) · second half, [T, N / 2] bfloat16; N / 2 must be whole tiles."""
    y = rows.values.new_empty(len(rows.values), matrix.outputs // 2)
    multiply(matrix, rows, y, epilogue=Epilogue.GATED, cut=cut_of(matrix, Epilogue.GATED))
    return y


def added(matrix: Matrix, rows: Rows, x: torch.Tensor, gain: torch.Tensor, eps: float) -> Rows:
    """Add the product to x [T, N] float32, in place; give x · gain [N], which lacks its norm's factor."""
    cut = cut_of(matrix, Epilogue.RESIDUAL)
    programs = -(-matrix.outputs // (TILE * cut.tiles))
    following = Rows(torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x), programs), eps)
    multiply(matrix, rows, x, epilogue=Epilogue.RESIDUAL, cut=cut, following=following, gain=gain)
    return following


def multiply(
    matrix: Matrix,
    rows: Rows,
    y: torch.Tensor,
    *,
    epilogue: Epilogue,
    cut: Cut,
    following: Rows | None = None,
    gain: torch.Tensor | None = None,
) -> None:
    """Launch it; `multiply` in `products.cu` says what goes where. RESIDUAL takes `following` and `gain`."""
    count, outputs = y.shape
    cut = cut.with_rows(count)
    columns = 1 if count <= CHUNK_ROWS // 2 else 2
    scaled = rows.squares is not None
    variant = Variant(matrix.group_size, cut, epilogue, columns, scaled)
    tiles = cut.tiles // 2 if epilogue is Epilogue.GATED else cut.tiles
    _kernel("multiply", variant).launch(
        (-(-count // (CHUNK_ROWS * cut.chunks)), -(-outputs // (TILE * tiles))),
        32 * cut.warps,
        (
            rows.values,
            matrix.weight,
            matrix.pairs,
            rows.squares,
            y,
            following.values if following else None,
            gain,
            following.squares if following else None,
            c_int(0 if rows.squares is None else rows.squares.shape[1]),
            c_int(count),
            c_int(outputs),
            c_int(matrix.width),
            c_float(rows.eps),
        ),
    )


def unpacked(matrix: Matrix) -> torch.Tensor:
    """4-bit weights as rows [N, K] of bfloat16."""
    dense = torch.empty(matrix.outputs, matrix.width, dtype=torch.bfloat16, device=matrix.weight.device)
    count = matrix.weight.numel()
    kernel = _kernel("unpack_rows", Variant(matrix.group_size, Cut(tiles=1, warps=1, ahead=1)))
    arguments = (matrix.weight, matrix.pairs, dense, c_int(matrix.outputs), c_int(matrix.width))
    kernel.launch((-(-count // _THREADS), 1), _THREADS, (*arguments, c_longlong(count)))
    return dense


@cache
def _kernel(name: str, variant: Variant) -> Kernel:
    return Kernel(compiled(SOURCE, variant.macros), name)
