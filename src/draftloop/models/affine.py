"""GGUF blocks to MLX's affine 4-bit form: w ≈ scale · code + bias, one pair for each 32 inputs.

Contract: rows of one tensor in, codes, scales and biases out; NumPy only. Q4_0, Q4_1 and Q4_K are
affine already and are re-encoded block by block; every other type is dequantized and fitted again.
Must not know files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP_SIZE = 32
BITS = 4
MAX_CODE = 2**BITS - 1
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that the fit tries: clipping an outlier may serve the other weights."""
_K_SUBBLOCKS = 8


@dataclass(frozen=True, slots=True)
class AffineRows:
    """Rows of a linear layer in MLX's form; G = in / 32.

    Attributes:
        weight: [rows, in / 8] uint32; code i of a word sits in its bits 4i … 4i+3.
        scales: [rows, G] bfloat16.
        biases: [rows, G] bfloat16.
    """

    weight: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any]


def encode_blocks(blocks: NDArray[np.uint8], kind: str) -> AffineRows:
    """Re-encode raw GGUF blocks, [rows, bytes of a row], of the type named `kind` ("Q4_K").

    Raises:
        NotImplementedError: the gguf package cannot dequantize `kind`.
    """
    affine = _AFFINE_KINDS.get(kind)
    # Damaged blocks may hold infinities; they reach the scales and biases, where the caller looks.
    with np.errstate(invalid="ignore", over="ignore"):
        if affine is None:
            return encode_dense(dequantize_blocks(blocks, kind))
        rows = blocks.shape[0]
        codes, scales, biases = affine(blocks)
        return _pack(codes.reshape(rows, -1, GROUP_SIZE), scales.reshape(rows, -1), biases.reshape(rows, -1))


def dequantize_blocks(blocks: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """[rows, bytes of a row] to [rows, in] float32.

    Raises:
        NotImplementedError: the gguf package cannot dequantize `kind`.
    """
    import gguf

    plain = {"F32": np.float32, "F16": np.float16}.get(kind)
    if plain is not None:
        return blocks.view(plain).astype(np.float32)
    values: NDArray[np.float32] = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return values


def encode_dense(weights: NDArray[np.float32]) -> AffineRows:
    """Fit scale, bias and codes to [rows, in] float32 weights; in is a multiple of 32.

    For each group the range is tried at several widths; each try is followed by the least-squares scale
    and bias for its codes, and the one with the smallest squared error is kept (the search that llama.cpp's
    k-quants make, here without their coarser scales).
    """
    rows = weights.shape[0]
    groups = weights.reshape(-1, GROUP_SIZE)
    low, high = groups.min(axis=1), groups.max(axis=1)
    middle, span = (low + high) / 2, high - low
    best_error = np.full(len(groups), np.inf, np.float32)
    best_scale, best_bias = np.zeros_like(low), low.copy()
    for shrink in _SHRINKS:
        scale = _nonzero(span * np.float32(shrink / MAX_CODE))
        bias = middle - scale * np.float32(MAX_CODE / 2)
        scale, bias = _least_squares(groups, _codes(groups, scale, bias))
        codes = _codes(groups, _nonzero(scale), bias)
        error = np.square(groups - (codes * scale[:, None] + bias[:, None])).sum(axis=1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale, best_bias = np.where(better, scale, best_scale), np.where(better, bias, best_bias)
    scale = _nonzero(_rounded(best_scale))
    bias = _rounded(best_bias)
    nibbles: NDArray[np.uint8] = _codes(groups, scale, bias).astype(np.uint8)
    return _pack(nibbles.reshape(rows, -1, GROUP_SIZE), scale.reshape(rows, -1), bias.reshape(rows, -1))


def _codes(
    groups: NDArray[np.float32], scale: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    codes = groups - bias[:, None]
    codes *= (1 / scale)[:, None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, MAX_CODE, out=codes)


def _least_squares(
    groups: NDArray[np.float32], codes: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean_code, mean = codes.mean(axis=1), groups.mean(axis=1)
    spread = np.einsum("gi,gi->g", codes, codes) / GROUP_SIZE - mean_code**2
    shared = np.einsum("gi,gi->g", codes, groups) / GROUP_SIZE - mean_code * mean
    scale = np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 0)
    return scale, mean - scale * mean_code


def _nonzero(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """A group of equal weights has no spread: any scale serves, but zero cannot divide."""
    return np.where(np.abs(scale) > 1e-30, scale, np.float32(1.0)).astype(np.float32)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _pack(codes: NDArray[np.uint8], scales: NDArray[np.float32], biases: NDArray[np.float32]) -> AffineRows:
    """Codes [rows, G, 32] to words: two codes make a byte, four bytes a little-endian word."""
    pairs = codes.reshape(codes.shape[0], -1, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << BITS)
    return AffineRows(
        weight=np.ascontiguousarray(packed).view("<u4"),
        scales=scales.astype(ml_dtypes.bfloat16),
        biases=biases.astype(ml_dtypes.bfloat16),
    )


_Affine = tuple["NDArray[np.uint8]", "NDArray[np.float32]", "NDArray[np.float32]"]


def _halves(blocks: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)[:, 0]


def _nibbles(quants: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[blocks, n] bytes to [blocks, 2, n]: the low nibbles are the first half of a block."""
    return np.stack((quants & 0x0F, quants >> 4), axis=1)


def _q4_0(rows: NDArray[np.uint8]) -> _Affine:
    blocks = rows.reshape(-1, 18)
    scale = _halves(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _q4_1(rows: NDArray[np.uint8]) -> _Affine:
    blocks = rows.reshape(-1, 20)
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q4_k(rows: NDArray[np.uint8]) -> _Affine:
    """256 weights in 8 sub-blocks: w = d · scale · code − dmin · minimum, with 6-bit scales and minima.

    Their 12 bytes hold four of each in the low 6 bits of bytes 0–3 and 4–7; the other four take a nibble
    of bytes 8–11 each and the 2 bits left over above (ggml's `get_scale_min_k4`).
    """
    blocks = rows.reshape(-1, 144)
    packed = blocks[:, 4:16]
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((first & 63, (third & 0x0F) | (first >> 6 << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
    quants = blocks[:, 16:].reshape(-1, _K_SUBBLOCKS // 2, GROUP_SIZE)
    codes = np.stack((quants & 0x0F, quants >> 4), axis=2)
    return codes, _halves(blocks, 0)[:, None] * scales, -_halves(blocks, 2)[:, None] * minima


_AFFINE_KINDS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
