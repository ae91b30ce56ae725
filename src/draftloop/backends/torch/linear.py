"""Linear layers: dense, and 4-bit or 8-bit weights multiplied as they are.

Contract: `layer(x)` maps [T, in] to [T, out] in the layer's activation dtype. MLX affine weights
(w = scale · code + bias) become PyTorch's int4 packing, which computes (code - 8) · scale + zero; hence
zero = bias + 8 · scale. Several layers that read the same input are fused by stacking their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from draftloop.backends.torch.cuda.packed import packed_int4_linear
from draftloop.backends.torch.native.library import load_library
from draftloop.backends.torch.native.linear import native_int4_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

_PACK_ROWS = 8192
"""Rows packed at a time: their codes take 4 bytes each while being packed."""
_ROW_MULTIPLE = 16
"""The kernels take rows by the 16 (CPU) or by the 8 (CUDA); the rest is padded."""
_CPU_BLOCK_ROWS = 4
"""The CPU kernel reads the weights once for up to four rows of input."""
_CUDA_K_TILES = (8, 4, 2)
"""How many tiles of 16 inputs the CUDA layout interleaves; the kernel asks for a divisor of the width."""


class Linear(Protocol):
    """[T, in] -> [T, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply, and add the bias where there is one."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """weight: [out, in]; bias: [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return torch.nn.functional.linear(x, self.weight, self.bias)

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """packed: in the device's own int4 layout; scales_and_zeros: [in / group, padded out, 2]; bias: [out]."""

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor
    group_size: int
    out_features: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        y: torch.Tensor
        if x.is_cuda:
            y = torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group_size, self.scales_and_zeros)
        elif _CPU_BLOCK_ROWS < len(x) < 2 * _CPU_BLOCK_ROWS:
            # Five to seven rows cost the kernel as much as eight; four and the rest cost less.
            y = torch.cat([self._on_cpu(part) for part in x.split(_CPU_BLOCK_ROWS)])
        else:
            y = self._on_cpu(x)
        if y.shape[1] > self.out_features:
            y = y[:, : self.out_features]
        return y if self.bias is None else y.add_(self.bias)

    def _on_cpu(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, self.group_size, self.scales_and_zeros
        )
        return product

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        return self.packed.nbytes + self.scales_and_zeros.nbytes


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """codes: [padded out, in] int8; scales: [padded out], one for each row; bias: [out] or None. CPU only."""

    codes: torch.Tensor
    scales: torch.Tensor
    out_features: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales)
        if y.shape[1] > self.out_features:
            y = y[:, : self.out_features]
        return y if self.bias is None else y.add_(self.bias)

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class AffineWeight:
    """One MLX affine 4-bit weight as stored.

    weight: [out, in / 8] int32 view of uint32, code i in bits 4i; scales, biases: [out, in / group].
    """

    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """[N, in / 8] 32-bit words -> [N, in] uint8 codes in 0…15 (little-endian: low nibble first)."""
    nibbles = packed.contiguous().view(torch.uint8)
    return torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(1)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[N, in] uint8 codes -> [N, in / 8] 32-bit words, the inverse of `unpack_codes`."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)


def dequantize(weight: AffineWeight, dtype: torch.dtype) -> torch.Tensor:
    """[N, in] dense values of the rows."""
    codes = unpack_codes(weight.weight)
    groups = weight.scales.shape[1]
    grouped = codes.view(len(codes), groups, -1).float()
    values = grouped * weight.scales.float().unsqueeze(-1) + weight.biases.float().unsqueeze(-1)
    return values.flatten(1).to(dtype)


def int4_linear(
    parts: Sequence[AffineWeight],
    bias: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Linear:
    """Stack the rows of `parts` and pack them for the fastest kernel that this device has."""
    if device.type == "cpu" and dtype is torch.bfloat16:
        library = load_library(torch.get_num_threads())
        if library is not None:
            return native_int4_linear(library, parts, bias, group_size)
    if device.type == "cuda" and dtype is torch.bfloat16:
        packed = packed_int4_linear(parts, bias, group_size, device)
        if packed is not None:
            return packed
    words = _pad_rows(torch.cat([part.weight for part in parts]))
    scales = torch.cat([part.scales for part in parts]).float()
    zeros = torch.cat([part.biases for part in parts]).float() + 8 * scales
    pairs = torch.stack((_pad_rows(scales).T, _pad_rows(zeros).T), dim=-1)
    return Int4Linear(
        packed=torch.cat([_pack(unpack_codes(rows), device) for rows in words.split(_PACK_ROWS)]),
        scales_and_zeros=pairs.to(dtype).contiguous().to(device),
        group_size=group_size,
        out_features=len(scales),
        bias=bias,
    )


def int8_linear(rows: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Int8Linear:
    """Round [out, in] float32 rows to 8 bits, each by its own largest value."""
    scales = (rows.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = _pad_rows((rows / scales.unsqueeze(1)).round_().to(torch.int8)).contiguous()
    return Int8Linear(codes, _pad_rows(scales.unsqueeze(1)).squeeze(1).to(dtype), len(rows), bias)


def _pad_rows(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % _ROW_MULTIPLE))


def _pack(codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[N, in] codes -> the kernel's layout, in which each 64 rows stand by themselves."""
    if device.type == "cuda":
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(device)
        tiles = next(tiles for tiles in _CUDA_K_TILES if codes.shape[1] % (16 * tiles) == 0)
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed
