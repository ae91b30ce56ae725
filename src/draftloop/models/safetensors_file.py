"""Safetensors files without a framework: writing one tensor after the other, and reading heads.

Contract: format of the safetensors specification: 8 bytes little-endian length, a JSON head, the data.
Must not know models.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEAD_BYTES = 100_000_000
"""The limit of the specification."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's type, in the format's words (`BF16`, `U32`), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        return prod(self.shape) * _BYTES[self.dtype]


class SafetensorsWriter:
    """Writes a file whose tensors are known before their values, so that memory holds one at a time.

    Args:
        path: the file to create.
        specs: every tensor; `write` is then called once for each, in this order.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._remaining = dict(specs)
        self._file = path.open("wb")
        head: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for name, spec in specs.items():
            begin, end = end, end + spec.num_bytes
            head[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Append the values of the next tensor.

        Raises:
            ValueError: `name` is not the next one, or its shape or size differs from its spec.
        """
        expected = next(iter(self._remaining), None)
        if name != expected or values.shape != self._remaining[name].shape:
            raise ValueError(f"{name} {values.shape} was written where {expected} was due")
        if values.nbytes != self._remaining.pop(name).num_bytes:
            raise ValueError(f"{name} has {values.dtype} values")
        self._file.write(values.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._remaining:
            raise ValueError(f"{next(iter(self._remaining))} was never written")


def read_head(path: Path) -> dict[str, TensorSpec]:
    """The tensors of one file, by name; the data is not read.

    Raises:
        ModelUnreadable: the file is missing, unreadable, truncated, or not safetensors.
    """
    remedy = "Pull or copy the model again."
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            head_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEAD_BYTES + 1
            if head_bytes > _MAX_HEAD_BYTES or head_bytes + 8 > size_bytes:
                raise ModelUnreadable(f"{path} is truncated or no safetensors file", remedy=remedy)
            head = json.loads(file.read(head_bytes))
        head.pop("__metadata__", None)
        specs = {name: TensorSpec(dtype=e["dtype"], shape=tuple(e["shape"])) for name, e in head.items()}
        end_bytes = 8 + head_bytes + max((int(e["data_offsets"][1]) for e in head.values()), default=0)
    except FileNotFoundError:
        raise ModelUnreadable(f"{path} is missing", remedy=remedy) from None
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error}", remedy="Check its permissions.") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelUnreadable(f"{path} has a damaged head: {error}", remedy=remedy) from error
    if end_bytes != size_bytes:
        raise ModelUnreadable(f"{path} has {size_bytes} bytes instead of {end_bytes}", remedy=remedy)
    return specs
