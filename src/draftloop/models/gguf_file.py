"""Reading a GGUF file: its metadata, its table of tensors, and raw rows of one tensor at a time.

Contract: everything is checked against the file's size before a tensor is read, so a truncated file is
refused up front. Layout: the GGUF specification of ggml, versions 2 and 3, little-endian. Must not know
what the tensors mean.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_REMEDY = "Download the file again, or choose another one."


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file.

    Attributes:
        name: GGUF's own name (`blk.0.attn_q.weight`).
        kind: ggml's name of its type (`Q4_K`).
        shape: outermost dimension first: [out, in] for a linear layer.
        offset_bytes: from the start of the file.
        num_bytes: its length in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the head of a GGUF file says.

    Attributes:
        path: where it lies.
        metadata: values by key; strings, numbers, booleans and lists of them.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def row_blocks(self, tensor: GgufTensor, rows_per_block: int) -> Iterator[NDArray[np.uint8]]:
        """The raw bytes of `tensor`, [rows, bytes of a row], some rows at a time.

        Raises:
            ModelUnreadable: the file ends early or cannot be read.
        """
        num_rows = prod(tensor.shape[:-1])
        row_bytes = tensor.num_bytes // num_rows
        try:
            with self.path.open("rb") as file:
                file.seek(tensor.offset_bytes)
                for start in range(0, num_rows, rows_per_block):
                    wanted = min(rows_per_block, num_rows - start)
                    data = file.read(wanted * row_bytes)
                    if len(data) < wanted * row_bytes:
                        raise ModelUnreadable(f"{self.path} ends inside {tensor.name}", remedy=_REMEDY)
                    yield np.frombuffer(data, np.uint8).reshape(wanted, row_bytes)
        except OSError as error:
            raise ModelUnreadable(f"{self.path} cannot be read: {error}", remedy=_REMEDY) from error


def read_gguf(path: Path) -> GgufFile:
    """Read the head of `path`.

    Raises:
        ModelUnreadable: not a GGUF file, truncated, corrupt, or with a tensor type that is not known.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelUnreadable(f"{path} is not a GGUF file", remedy="Name a .gguf file of a model.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise ModelUnreadable(
            f"{path} cannot be read: {error}", remedy="Check the file's permissions."
        ) from error
    except (struct.error, ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ModelUnreadable(f"{path} is truncated or corrupt ({error})", remedy=_REMEDY) from error


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data, len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ModelUnreadable(
            f"{path} is GGUF version {version}", remedy="Choose a little-endian file of version 2 or 3."
        )
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    heads = []
    for _ in range(num_tensors):
        name = cursor.string()
        dims = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))
        heads.append((name, dims[::-1], cursor.scalar("I"), cursor.scalar("Q")))
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _tensor(path, name, shape, kind, start + at) for name, shape, kind, at in heads}
    needed = max((t.offset_bytes + t.num_bytes for t in tensors.values()), default=start)
    if needed > len(data):
        raise ModelUnreadable(f"{path} is truncated: {len(data)} bytes of {needed}", remedy=_REMEDY)
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset_bytes: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        raise ModelUnreadable(f"{path}: {name} has the unknown tensor type {kind}", remedy=_REMEDY) from None
    block_values, block_bytes = GGML_QUANT_SIZES[quantization]
    if not shape or prod(shape) == 0 or shape[-1] % block_values:
        raise ModelUnreadable(f"{path}: {name} has the impossible shape {list(shape)}", remedy=_REMEDY)
    return GgufTensor(
        name=name,
        kind=quantization.name,
        shape=shape,
        offset_bytes=offset_bytes,
        num_bytes=prod(shape) // block_values * block_bytes,
    )


class _Cursor:
    """Reads values one after the other; past the end it raises struct.error."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self._expect(length)
        text = self._data[self.position : self.position + length].decode("utf-8")
        self.position += length
        return text

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise struct.error(f"unknown value type {kind}")
        kind, length = self.scalar("I"), self.scalar("Q")
        self._expect(length)
        if kind in _SCALARS:
            numbers = struct.unpack_from(f"<{length}{_SCALARS[kind]}", self._data, self.position)
            self.position += struct.calcsize(f"<{length}{_SCALARS[kind]}")
            return list(numbers)
        return [self.value(kind) for _ in range(length)]

    def _expect(self, num_bytes: int) -> None:
        """An array's values take at least a byte each: a corrupt length must not fill the memory."""
        if num_bytes > len(self._data) - self.position:
            raise struct.error(f"a length of {num_bytes} points past the end")
