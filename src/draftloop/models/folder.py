"""Whether a folder of safetensors is whole: config, shards, tensors and tokenizer, without reading weights.

Contract: heads of files only, so it is quick on any model. Must not know where the folder came from.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from draftloop.backends.architecture import Architecture, read_architecture
from draftloop.errors import ModelUnreadable
from draftloop.models.safetensors_file import TensorSpec, read_head

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_INDEX = "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32")
_WORD_BITS = 32
_REMEDY = "Pull or copy the model again, or choose another one."


def check_folder(folder: Path) -> Architecture:
    """Check that a backend can load `folder`, and return its shapes.

    Raises:
        ModelUnreadable: names the file or the tensor that is missing, damaged or of the wrong shape.
    """
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise ModelUnreadable(
            f"{folder} cannot be read: {error}", remedy="Check the path and its permissions."
        ) from error
    if not names:
        raise ModelUnreadable(
            f"{folder} is empty", remedy="Name a folder with config.json and *.safetensors."
        )
    architecture = read_architecture(folder)
    if "tokenizer.json" not in names:
        raise ModelUnreadable(f"{folder} has no tokenizer.json", remedy=_REMEDY)
    _check_tensors(folder, architecture, _read_heads(folder))
    return architecture


def folder_bytes(folder: Path) -> int:
    """What the folder's own files occupy; links to files count as those files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def expected_tensors(architecture: Architecture) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of `architecture` must hold; a dense one's dtype is given as BF16."""
    expected = {"model.norm.weight": TensorSpec("BF16", (architecture.hidden_size,))}
    table = (architecture.vocab_size, architecture.hidden_size)
    expected |= _linear("model.embed_tokens", table, architecture)
    if not architecture.tied_embeddings:
        expected |= _linear("lm_head", table, architecture)
    for layer in range(architecture.num_layers):
        expected |= _layer(f"model.layers.{layer}", architecture)
    return expected


def _layer(prefix: str, architecture: Architecture) -> dict[str, TensorSpec]:
    norm = TensorSpec("BF16", (architecture.hidden_size,))
    tensors = {f"{prefix}.{name}.weight": norm for name in ("input_layernorm", "post_attention_layernorm")}
    for name, shape in architecture.linear_shapes.items():
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        tensors |= _linear(f"{prefix}.{block}.{name}", shape, architecture)
        if architecture.attention_bias and name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.{block}.{name}.bias"] = TensorSpec("BF16", shape[:1])
    if architecture.qk_norm:
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = TensorSpec("BF16", (architecture.head_dim,))
    return tensors


def _linear(module: str, shape: tuple[int, int], architecture: Architecture) -> dict[str, TensorSpec]:
    quantization = architecture.quantization
    if quantization is None:
        return {f"{module}.weight": TensorSpec("BF16", shape)}
    rows, width = shape
    groups = TensorSpec("BF16", (rows, width // quantization.group_size))
    return {
        f"{module}.weight": TensorSpec("U32", (rows, width * quantization.bits // _WORD_BITS)),
        f"{module}.scales": groups,
        f"{module}.biases": groups,
    }


def _read_heads(folder: Path) -> dict[str, TensorSpec]:
    index = folder / _INDEX
    if not index.exists():
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise ModelUnreadable(f"{folder} has no *.safetensors file", remedy=_REMEDY)
        return {name: spec for shard in shards for name, spec in read_head(shard).items()}
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shard_names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnreadable(f"{index} cannot be read: {error}", remedy=_REMEDY) from error
    tensors = {name: spec for shard in shard_names for name, spec in read_head(folder / shard).items()}
    for name, shard in places.items():
        if name not in tensors:
            raise ModelUnreadable(f"{folder / shard} lacks {name}, which the index promises", remedy=_REMEDY)
    return tensors


def _check_tensors(folder: Path, architecture: Architecture, found: Mapping[str, TensorSpec]) -> None:
    expected = expected_tensors(architecture)
    for name, spec in expected.items():
        actual = found.get(name)
        if actual is None:
            raise ModelUnreadable(f"{folder} lacks the tensor {name}", remedy=_REMEDY)
        if actual.shape != spec.shape:
            raise ModelUnreadable(
                f"{folder}: {name} has the shape {list(actual.shape)} instead of {list(spec.shape)}",
                remedy=_REMEDY,
            )
        if actual.dtype != spec.dtype and not (spec.dtype == "BF16" and actual.dtype in _FLOATS):
            raise ModelUnreadable(f"{folder}: {name} has the type {actual.dtype}", remedy=_REMEDY)
    for name in found:
        ignorable = name.endswith("rotary_emb.inv_freq") or (
            architecture.tied_embeddings and "lm_head." in name
        )
        if name not in expected and not ignorable:
            raise ModelUnreadable(
                f"{folder} holds {name}, which no {architecture.model_type} model of this config has",
                remedy=_REMEDY,
            )
