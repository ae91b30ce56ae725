"""A GGUF file to a folder that every backend reads: MLX affine 4-bit, group 32.

Contract: tensor by tensor, so memory holds one tensor's result and a few thousand rows beside it. Linear
layers and the embedding become 4-bit, norms and biases bfloat16. Must not know caches or names of models.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from draftloop.errors import ModelUnreadable
from draftloop.models.affine import BITS, GROUP_SIZE, AffineRows, dequantize_blocks, encode_blocks
from draftloop.models.gguf_config import generation_config, hf_config, hf_name
from draftloop.models.gguf_tokenizer import write_tokenizer
from draftloop.models.safetensors_file import SafetensorsWriter, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from draftloop.models.gguf_file import GgufFile, GgufTensor
    from draftloop.models.progress import Progress, Task

CONVERTER_VERSION = 1
"""Raised when the result of a conversion changes, so that older folders in caches are not used."""

_HEAD, _EMBEDDING, _ROPE = "output.weight", "token_embd.weight", "rope_freqs.weight"
_CHUNK_VALUES = 1 << 18
"""Weights encoded at a time: their temporaries stay inside a core's cache."""

_SAMPLE_ROWS = 256
_SAME_MATRIX_ERROR = 0.2
"""Two quantizations of one matrix differ by the sum of their errors, below this down to 4 bits (measured:
0.074 for Q4_K against Q6_K); two different matrices differ by more than 1."""


def convert_gguf(gguf: GgufFile, folder: Path, progress: Progress) -> None:
    """Write the model of `gguf`, whose head has been read, into the existing, empty `folder`.

    Raises:
        ModelUnreadable: the file is damaged, or describes what no backend runs.
        OSError: `folder` cannot be written.
    """
    path = gguf.path
    if _EMBEDDING not in gguf.tensors:
        raise ModelUnreadable(
            f"{path} has no {_EMBEDDING}", remedy="Choose a GGUF file of a whole language model."
        )
    tied = _is_tied(gguf)
    config = hf_config(gguf.metadata, gguf.tensors, tied=tied, rope_factors=_rope_factors(gguf))
    quantization = {"group_size": GROUP_SIZE, "bits": BITS}
    config |= {
        "vocab_size": gguf.tensors[_EMBEDDING].shape[0],
        "quantization": quantization,
        "quantization_config": quantization,
    }
    sources = _sources(gguf, tied=tied)
    for tensor in sources.values():
        _refuse_odd_width(path, tensor)
    write_tokenizer(gguf.metadata, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(gguf.metadata))
    specs = {part: spec for name, tensor in sources.items() for part, spec in _specs(name, tensor).items()}
    total_bytes = sum(tensor.num_bytes for tensor in sources.values())
    with (
        progress.task(f"Converting {path.name}", total_bytes) as task,
        SafetensorsWriter(folder / "model.safetensors", specs) as writer,
        ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool,
    ):
        work = _Work(gguf=gguf, config=config, pool=pool, task=task)
        for name, tensor in sources.items():
            for part, values in _encoded(work, name, tensor).items():
                writer.write(part, values)


def converted_bytes(gguf: GgufFile) -> int:
    """How large the folder for `gguf` will be, the tokenizer apart."""
    # A tensor of three dimensions has no place in the folder: the conversion refuses it by name.
    kept = [tensor for name, tensor in gguf.tensors.items() if name != _ROPE and len(tensor.shape) <= 2]
    return sum(spec.num_bytes for tensor in kept for spec in _specs(tensor.name, tensor).values())


def _is_tied(gguf: GgufFile) -> bool:
    """Whether the output head is the embedding: absent, or the same matrix quantized a second time.

    llama.cpp's converters write a tied head as a tensor of its own where it is to be stored with more bits.
    """
    head, embedding = gguf.tensors.get(_HEAD), gguf.tensors[_EMBEDDING]
    if head is None:
        return True
    if head.shape != embedding.shape:
        return False
    first, second = (
        dequantize_blocks(next(gguf.row_blocks(tensor, _SAMPLE_ROWS)), tensor.kind)
        for tensor in (head, embedding)
    )
    return bool(np.linalg.norm(first - second) < _SAME_MATRIX_ERROR * np.linalg.norm(first))


def _rope_factors(gguf: GgufFile) -> NDArray[np.float32] | None:
    tensor = gguf.tensors.get(_ROPE)
    return None if tensor is None else dequantize_blocks(next(gguf.row_blocks(tensor, 1)), tensor.kind)[0]


def _sources(gguf: GgufFile, *, tied: bool) -> dict[str, GgufTensor]:
    """Which tensor each name of the folder is made from. A tied matrix comes from its better copy."""
    tensors = {hf_name(name): tensor for name, tensor in gguf.tensors.items() if name not in (_ROPE, _HEAD)}
    if _HEAD in gguf.tensors:
        tensors[hf_name(_EMBEDDING if tied else _HEAD)] = gguf.tensors[_HEAD]
    return tensors


def _refuse_odd_width(path: Path, tensor: GgufTensor) -> None:
    if len(tensor.shape) > 2:
        raise ModelUnreadable(
            f"{path}: {tensor.name} has {len(tensor.shape)} dimensions",
            remedy="Choose a dense language model.",
        )
    if len(tensor.shape) == 2 and tensor.shape[1] % GROUP_SIZE:
        raise ModelUnreadable(
            f"{path}: the width {tensor.shape[1]} of {tensor.name} is no multiple of {GROUP_SIZE}",
            remedy="Choose a model whose layers can be quantized in groups of 32.",
        )


def _specs(name: str, tensor: GgufTensor) -> dict[str, TensorSpec]:
    if len(tensor.shape) == 1:
        return {name: TensorSpec("BF16", tensor.shape)}
    rows, width = tensor.shape
    module = name.removesuffix(".weight")
    return {
        f"{module}.weight": TensorSpec("U32", (rows, width * BITS // 32)),
        f"{module}.scales": TensorSpec("BF16", (rows, width // GROUP_SIZE)),
        f"{module}.biases": TensorSpec("BF16", (rows, width // GROUP_SIZE)),
    }


@dataclass(frozen=True, slots=True)
class _Work:
    """What encoding a tensor needs beside the tensor."""

    gguf: GgufFile
    config: dict[str, Any]
    pool: ThreadPoolExecutor
    task: Task


def _encoded(work: _Work, name: str, tensor: GgufTensor) -> dict[str, NDArray[Any]]:
    gguf = work.gguf
    try:
        if len(tensor.shape) == 1:
            values = dequantize_blocks(next(gguf.row_blocks(tensor, 1)), tensor.kind)[0]
            parts = {name: _unrotated(name, values, work.config).astype(ml_dtypes.bfloat16)}
            work.task.advance(tensor.num_bytes)
        else:
            parts = _encoded_matrix(work, name, tensor)
    except NotImplementedError as error:
        raise ModelUnreadable(
            f"{gguf.path}: the type {tensor.kind} of {tensor.name} is not supported",
            remedy="Choose a file quantized as Q4_K_M, Q4_0, Q5_0, Q6_K or Q8_0.",
        ) from error
    for values in parts.values():
        if values.dtype != np.uint32 and not np.isfinite(values.astype(np.float32)).all():
            raise ModelUnreadable(
                f"{gguf.path}: {tensor.name} holds values that are not finite",
                remedy="Download the file again.",
            )
    return parts


def _encoded_matrix(work: _Work, name: str, tensor: GgufTensor) -> dict[str, NDArray[Any]]:
    blocks = work.gguf.row_blocks(tensor, rows_per_block=max(1, _CHUNK_VALUES // tensor.shape[1]))
    done = []
    for rows in work.pool.map(lambda block: encode_blocks(block, tensor.kind), blocks):
        done.append(rows)
        work.task.advance(len(rows.weight) * (tensor.num_bytes // tensor.shape[0]))
    module = name.removesuffix(".weight")

    def joined(field: str) -> NDArray[Any]:
        return _unrotated(name, np.concatenate([getattr(rows, field) for rows in done]), work.config)

    return {f"{module}.{field}": joined(field) for field in AffineRows.__dataclass_fields__}


def _unrotated(name: str, values: NDArray[Any], config: dict[str, Any]) -> NDArray[Any]:
    """Undo the order of rows that a `llama` GGUF gives q and k.

    ggml rotates neighbouring values, Hugging Face's models the two halves of a head; llama.cpp's converter
    interleaves the halves of each head's rows for this architecture, and for no other.
    """
    if config["model_type"] != "llama" or not any(f".{module}." in name for module in ("q_proj", "k_proj")):
        return values
    pairs = values.reshape(-1, config["head_dim"] // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
