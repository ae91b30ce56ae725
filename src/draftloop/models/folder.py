"""Whether a folder of safetensors is whole: config, shards, tensors and tokenizer, without reading weights.

Contract: heads of files only, so it is quick on any model. Must not know where the folder came from.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from draftloop.backends.architecture import Architecture, read_architecture, tensor_shapes
from draftloop.errors import ModelUnreadable
from draftloop.models.safetensors_file import TensorSpec, read_head

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_INDEX = "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32")
_WORD_BITS = 32
_DIGESTED_BYTES = 1 << 20
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


def heads_digest(folder: Path) -> str:
    """SHA-256 over config.json and each shard's size and first MiB: tells models apart without reading all.

    Raises:
        ModelUnreadable: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(folder.iterdir()):
            if file.name == "config.json" or file.suffix == ".safetensors":
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                with file.open("rb") as opened:
                    digest.update(opened.read(_DIGESTED_BYTES))
    except OSError as error:
        raise ModelUnreadable(f"{folder} cannot be read: {error}", remedy=_REMEDY) from error
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """What the folder's own files occupy; links to files count as those files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def damaged_files(folder: Path) -> list[str]:
    """Names of the files of `folder` that a new download would mend: unreadable JSON, broken shards."""
    return sorted(file.name for file in folder.iterdir() if _is_damaged(file))


def has_every_file(folder: Path) -> bool:
    """Whether config, tokenizer and every shard are there, damaged or not."""
    try:
        shards = list(_shard_places(folder)[1])
    except ModelUnreadable:
        return (folder / _INDEX).is_file()
    names = ["config.json", "tokenizer.json", *shards]
    return bool(shards) and all((folder / name).is_file() for name in names)


def expected_tensors(architecture: Architecture) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of `architecture` must hold; a dense one's dtype is given as BF16."""
    quantization = architecture.quantization
    expected = {}
    for name, shape in tensor_shapes(architecture).items():
        if quantization is None or len(shape) == 1:
            expected[name] = TensorSpec("BF16", shape)
            continue
        module, (rows, width) = name.removesuffix(".weight"), shape
        groups = TensorSpec("BF16", (rows, width // quantization.group_size))
        expected[name] = TensorSpec("U32", (rows, width * quantization.bits // _WORD_BITS))
        expected[f"{module}.scales"] = expected[f"{module}.biases"] = groups
    return expected


def _is_damaged(file: Path) -> bool:
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            read_head(file)
    except (OSError, ValueError, RecursionError, ModelUnreadable):
        return True
    return False


def _read_heads(folder: Path) -> dict[str, TensorSpec]:
    places, shards = _shard_places(folder)
    tensors = {name: spec for shard in shards for name, spec in read_head(folder / shard).items()}
    for name, shard in places.items():
        if name not in tensors:
            raise ModelUnreadable(f"{folder / shard} lacks {name}, which the index promises", remedy=_REMEDY)
    return tensors


def _shard_places(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Which shard the index promises each tensor in (nothing without an index), and the shards' names."""
    index = folder / _INDEX
    if not index.exists():
        shards = sorted(shard.name for shard in folder.glob("*.safetensors"))
        if not shards:
            raise ModelUnreadable(f"{folder} has no *.safetensors file", remedy=_REMEDY)
        return {}, shards
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a shard's name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelUnreadable(f"{index} cannot be read: {error}", remedy=_REMEDY) from error
    return places, names


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
