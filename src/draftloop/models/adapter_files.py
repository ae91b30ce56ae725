"""Adapters on disk, in PEFT's layout: written whole or not at all, read with suspicion.

Contract: `write_adapter` and `read_adapter` know files, names and shapes. What PEFT can do and Draftloop
cannot is refused by name, never computed differently. Must not know a backend, nor which adapter is active.

Layout: `adapter_config.json` and `adapter_model.safetensors` as PEFT's `save_pretrained` writes them, and
`draftloop.json`, what Draftloop knows of it.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from draftloop.backends.lora import Lora, LoraModule, LoraSpec
from draftloop.errors import ModelUnreadable, StorageError
from draftloop.models.cache import exclusive, new_folder, remove_folders, storage_errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
FACTS_FILE = "draftloop.json"

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# ml_dtypes has no stubs of its dtypes as numpy wants them, hence Any.
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_MUST_BE_OFF = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config"),
)
"""Settings of PEFT with which the adapter is more, or something else, than two matrices a module."""
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` of adapters that begin on the base as it is; PiSSA and its like change the base."""
_REMEDY = "Choose another adapter, or train a new one; draftloop adapters revert takes an active one away."
_STORAGE_REMEDY = "Free some space or check the permissions, or set storage.directory to another folder."


def write_adapter(folder: Path, lora: Lora, *, base_model: str, facts: Mapping[str, Any]) -> None:
    """Write `lora` as `folder`, in float32.

    A kill at any moment leaves the folder whole or absent, and what it did leave is removed by the next
    write. A folder that is already there is replaced: the caller names adapters, and one that it does not
    know of is what a killed run left.

    Args:
        folder: its last part is the adapter's name.
        lora: A [r, in] and B [out, r] of each module.
        base_model: the draft's name.
        facts: plain JSON, everything else that is known of the adapter.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    tensors = {}
    for name, module in lora.modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(module.a, np.float32)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(module.b, np.float32)
    try:
        with storage_errors(f"writing {folder}"), exclusive(folder):
            with new_folder(folder) as temporary:
                save_file(tensors, temporary / TENSORS_FILE, metadata={"format": "pt"})
                _write_json(temporary / CONFIG_FILE, _peft_config(lora.spec, base_model))
                _write_json(temporary / FACTS_FILE, facts)
                _flush_names(temporary)
                if folder.exists():
                    folder.rename(folder.with_name(f".{folder.name}.replaced"))
            # The store will call the adapter active: its name must be on the disk before that is.
            _flush_names(folder.parent)
            remove_folders(folder.parent, f".{folder.name}.")
    except safetensors.SafetensorError as error:
        raise StorageError(f"An error stopped writing {folder}: {error}", remedy=_STORAGE_REMEDY) from error
    except StorageError as error:
        raise StorageError(error.what, remedy=_STORAGE_REMEDY) from error


def read_adapter(folder: Path) -> Lora:
    """Read an adapter that Draftloop or PEFT wrote; float16 and bfloat16 become float32.

    Modules come in the checkpoint's order. `target_modules` is what the tensors' names say, whatever form
    (a list, a pattern) the config gives it in.

    Raises:
        ModelUnreadable: a file is missing, damaged, or of a kind that Draftloop does not run.
    """
    rank, alpha = _read_config(folder / CONFIG_FILE)
    path = folder / TENSORS_FILE
    sides: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, values in _read_tensors(path).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelUnreadable(f"{path} holds {name}, which is no LoRA of a linear module", remedy=_REMEDY)
        sides.setdefault(match["module"], {})[match["side"]] = values
    if not sides:
        raise ModelUnreadable(f"{path} holds no tensor", remedy=_REMEDY)
    modules = {name: _module(path, name, sides[name], rank) for name in sorted(sides, key=_place)}
    kinds = {name.rpartition(".")[2] for name in modules}
    return Lora(LoraSpec(rank, alpha, tuple(sorted(kinds, key=_place))), modules)


def _peft_config(spec: LoraSpec, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(spec.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _flush_names(folder: Path) -> None:
    """Bring a folder's entries to the disk; after a loss of power a rename may otherwise not have been."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and alpha, where the rest of the config is plain LoRA."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelUnreadable(f"{path} is missing", remedy=_REMEDY) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnreadable(f"{path} cannot be read: {error}", remedy=_REMEDY) from error
    if not isinstance(config, dict):
        raise ModelUnreadable(f"{path} holds no JSON object", remedy=_REMEDY)
    odd = [name for name in _MUST_BE_OFF if config.get(name)]
    if config.get("peft_type") != "LORA":
        odd.insert(0, "peft_type")
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        odd.append("init_lora_weights")
    if odd:
        value = json.dumps(config.get(odd[0]))
        raise ModelUnreadable(f"{path}: {odd[0]} = {value:.80} is not supported", remedy=_REMEDY)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ModelUnreadable(f"{path}: r = {rank!r:.80} is no rank", remedy=_REMEDY)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ModelUnreadable(f"{path}: lora_alpha = {alpha!r:.80} is no positive number", remedy=_REMEDY)
    return rank, float(alpha)


def _read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    try:
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError:
        raise ModelUnreadable(f"{path} is missing", remedy=_REMEDY) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelUnreadable(f"{path} cannot be read: {error}", remedy=_REMEDY) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ModelUnreadable(f"{path}: tensor {name} holds {entry['dtype']}", remedy=_REMEDY)
        values = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = values.astype(np.float32)
        if not np.isfinite(tensors[name]).all():
            raise ModelUnreadable(f"{path}: tensor {name} holds what is no number", remedy=_REMEDY)
    return tensors


def _module(path: Path, name: str, sides: Mapping[str, NDArray[np.float32]], rank: int) -> LoraModule:
    if len(sides) < 2:
        raise ModelUnreadable(f"{path} lacks one of A and B of {name}", remedy=_REMEDY)
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelUnreadable(
            f"{path}: A and B of {name} are {list(a.shape)} and {list(b.shape)}, and {CONFIG_FILE} says r = "
            f"{rank}",
            remedy=_REMEDY,
        )
    return LoraModule(a, b)


def _place(name: str) -> tuple[list[int], int, str]:
    """Where a module stands in a checkpoint: by layer, then in the order of the layer's linear modules."""
    kind = name.rpartition(".")[2]
    layers = [int(number) for number in re.findall(r"\d+", name)]
    return layers, _MODULES.index(kind) if kind in _MODULES else len(_MODULES), name
