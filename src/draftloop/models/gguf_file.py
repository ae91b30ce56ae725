"""Reading a GGUF file: its metadata, its table of tensors, and raw rows of one tensor at a time.

Contract: the gguf package reads the head, and everything is checked against the file's size before a tensor
is read, so a truncated file is refused up front. Little-endian files of versions 2 and 3. Must not know
what the tensors mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor
    from numpy.typing import DTypeLike, NDArray

_MAGIC = b"GGUF"
_HOST_ORDER = "I"
"""gguf's sign for a file in this machine's byte order."""

_MAX_VALUES = 1 << 22
"""More than any head holds: a vocabulary of 152 thousand tokens and its merges take 0.8 million."""

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
    """Read the head of `path`: some seconds for a vocabulary of 150 thousand tokens.

    Raises:
        ModelUnreadable: not a GGUF file, truncated, corrupt, or with a tensor type that is not known.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelUnreadable(f"{path} is not a GGUF file", remedy="Name a .gguf file of a model.")
        with np.errstate(all="raise"):
            reader = _bounded_reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise ModelUnreadable(
            f"{path} cannot be read: {error}", remedy="Check the file's permissions."
        ) from error
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ModelUnreadable(
            f"{path} is corrupt or of an unknown version ({error})", remedy=_REMEDY
        ) from error
    if reader.byte_order != _HOST_ORDER:
        raise ModelUnreadable(f"{path} is big-endian", remedy="Choose a little-endian file.")
    tensors = {tensor.name: _tensor(path, tensor) for tensor in reader.tensors}
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _bounded_reader(path: Path) -> GGUFReader:
    """The gguf package's reader, with its one access to the file bounded.

    As published it reads past the end without an error, so a corrupt length of an array of numbers keeps it
    appending nothing for ever.
    """
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        num_reads = 0
        data_offset = 0

        def _get(
            self,
            offset: int,
            dtype: DTypeLike,
            count: int = 1,
            override_order: Literal["I", "S", "<"] | None = None,
        ) -> NDArray[Any]:
            self.num_reads += 1
            in_head = not self.data_offset
            if self.num_reads > _MAX_VALUES or (in_head and count > _MAX_VALUES):
                raise ValueError(f"more than {_MAX_VALUES} values or bytes of text")
            kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            end = int(offset) + int(count) * kind.itemsize
            if end > len(self.data):
                raise ModelUnreadable(
                    f"{path} is truncated or corrupt: {len(self.data)} bytes of at least {end}",
                    remedy=_REMEDY,
                )
            # Not a slice of the memory map: those take five times as long and twice the memory.
            return np.frombuffer(self.data, kind, int(count), int(offset))

    return BoundedReader(path)


def _tensor(path: Path, tensor: ReaderTensor) -> GgufTensor:
    shape = tuple(reversed(tensor.shape.tolist()))
    if prod(shape) == 0 or not shape:
        raise ModelUnreadable(f"{path}: {tensor.name} has the impossible shape {list(shape)}", remedy=_REMEDY)
    return GgufTensor(
        name=tensor.name,
        kind=tensor.tensor_type.name,
        shape=shape,
        offset_bytes=tensor.data_offset,
        num_bytes=tensor.n_bytes,
    )
