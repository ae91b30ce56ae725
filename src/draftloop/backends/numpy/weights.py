"""A folder's safetensors as float32 arrays, MLX's affine 4-bit ones unpacked.

Contract: `read_weights` gives every tensor by its checkpoint name; a quantized matrix appears once, as
`<module>.weight`. Must not know what the tensors are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import safetensors

from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Quantization

    Floats = NDArray[np.float32]

# ml_dtypes has no stubs of its dtypes as numpy wants them, hence Any.
_DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
}


def read_weights(folder: Path, quantization: Quantization | None) -> dict[str, Floats]:
    """Every tensor of `folder/*.safetensors`, dequantized.

    Raises:
        ModelUnreadable: no file, a damaged one, or a type of number that is not expected.
    """
    tensors: dict[str, NDArray[Any]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelUnreadable(f"{folder} has no *.safetensors", remedy="Pull or convert the model again.")
    for file in files:
        tensors.update(_read_file(file))
    weights: dict[str, Floats] = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if value.dtype == np.uint32:
            weights[name] = _dequantize(module, tensors, quantization)
        elif not name.endswith((".scales", ".biases")):
            weights[name] = value.astype(np.float32)
    return weights


def _read_file(file: Path) -> dict[str, NDArray[Any]]:
    parse: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize
    try:
        entries = parse(file.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelUnreadable(f"{file} cannot be read: {error}", remedy="Pull the model again.") from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ModelUnreadable(
                f"{file}: tensor {name} holds {entry['dtype']}",
                remedy="Choose a checkpoint in bfloat16, float16, float32 or MLX affine 4-bit.",
            )
        tensors[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _dequantize(module: str, tensors: dict[str, NDArray[Any]], quantization: Quantization | None) -> Floats:
    """[out, in / 8] words, [out, in / group] scales and biases → [out, in]: w = scale · code + bias."""
    try:
        words, scales, biases = (tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
    except KeyError as error:
        raise ModelUnreadable(f"tensor {error} is missing", remedy="Pull the model again.") from None
    if quantization is None:
        raise ModelUnreadable(
            f"{module} is packed, but config.json names no quantization", remedy="Pull the model again."
        )
    rows = words.shape[0]
    codes = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    groups = codes.reshape(rows, -1, quantization.group_size).astype(np.float32)
    if groups.shape[:2] != scales.shape or scales.shape != biases.shape:
        raise ModelUnreadable(
            f"{module}: scales are {list(scales.shape)}, its words need {list(groups.shape[:2])}",
            remedy="Pull the model again.",
        )
    values: Floats = groups * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return values.reshape(rows, -1)
