"""Arrays of one request <-> bytes.

Contract: `unpack(pack(x))` is x, log-probabilities rounded to 16 bits. Must not know SQL.

Layout 1, little-endian, without padding; P prompt tokens, R answer tokens, N = 32 top tokens a row:

    layout         uint8 = 1
    N              uint8 = 32
    P, R           uint32 each
    prompt_tokens  int32   [P]
    answer_tokens  int32   [R]
    round_index    int32   [R]
    draft_ids      int32   [R]
    draft_probs    float32 [R]
    tail_mass      float32 [R]
    top_ids        int32   [R, N]
    top_logprobs   float16 [R, N]
    kinds          uint8   [R]
    checksum       uint32, CRC-32 of everything before it

213 bytes a position. The first byte stays the layout's number in every later one.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.storage.records import TraceRows
from draftloop.types import TRACE_TOP_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYOUT = 1

_HEADER = struct.Struct("<BBII")
_CHECKSUM = struct.Struct("<I")
_TRACE_COLUMNS = (
    ("round_index", "<i4", False),
    ("draft_ids", "<i4", False),
    ("draft_probs", "<f4", False),
    ("tail_mass", "<f4", False),
    ("top_ids", "<i4", True),
    ("top_logprobs", "<f2", True),
    ("kinds", "<u1", False),
)
"""Name, stored type, and whether a row has N entries."""


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What is packed. prompt_tokens: [P] int32; answer_tokens: [R] int32; traces: R rows."""

    prompt_tokens: NDArray[np.int32]
    answer_tokens: NDArray[np.int32]
    traces: TraceRows


def pack(contents: Contents) -> bytes:
    """The bytes of one request.

    Raises:
        ValueError: an array has another shape than the answer's length asks for.
    """
    rows = len(contents.answer_tokens)
    parts = [
        _HEADER.pack(LAYOUT, TRACE_TOP_TOKENS, len(contents.prompt_tokens), rows),
        _column("prompt_tokens", contents.prompt_tokens, "<i4", (len(contents.prompt_tokens),)),
        _column("answer_tokens", contents.answer_tokens, "<i4", (rows,)),
    ]
    for name, stored, wide in _TRACE_COLUMNS:
        shape = (rows, TRACE_TOP_TOKENS) if wide else (rows,)
        parts.append(_column(name, getattr(contents.traces, name), stored, shape))
    body = b"".join(parts)
    return body + _CHECKSUM.pack(zlib.crc32(body))


def unpack(packed: bytes) -> Contents:
    """The arrays of one request, as copies that may be written to.

    Raises:
        ValueError: the bytes are damaged, or of a layout that this version does not read.
    """
    if len(packed) < _HEADER.size + _CHECKSUM.size:
        raise ValueError(f"{len(packed)} bytes are too few")
    if packed[0] != LAYOUT:
        raise ValueError(f"layout {packed[0]} is not {LAYOUT}")
    body = packed[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(packed[-_CHECKSUM.size :])[0] != zlib.crc32(body):
        raise ValueError("the checksum does not match")
    _, width, prompt, rows = _HEADER.unpack_from(body)
    offset = _HEADER.size

    def read(stored: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
        nonlocal offset
        count = int(np.prod(shape))
        column = np.frombuffer(body, stored, count, offset).reshape(shape)
        offset += column.nbytes
        return column

    prompt_tokens = read("<i4", (prompt,)).astype(np.int32)
    answer_tokens = read("<i4", (rows,)).astype(np.int32)
    traces = {
        name: read(stored, (rows, width) if wide else (rows,)).astype(_in_memory(stored))
        for name, stored, wide in _TRACE_COLUMNS
    }
    if offset != len(body):
        raise ValueError(f"{len(body)} bytes hold {offset}")
    return Contents(prompt_tokens, answer_tokens, TraceRows(**traces))


def _column(name: str, values: NDArray[np.generic], stored: str, shape: tuple[int, ...]) -> bytes:
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, not {shape}")
    # A log-probability below the least of 16 bits becomes -inf: either way the probability is 0.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, stored).tobytes()


def _in_memory(stored: str) -> str:
    return {"<i4": "int32", "<u1": "uint8"}.get(stored, "float32")
