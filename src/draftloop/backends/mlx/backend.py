"""`MlxBackend`: mlx-lm's model zoo, caches and quantized layers behind the seam of `backends/base.py`.

Contract: opens a device and loads folders. Sets no process-wide state (default device, memory limits).
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from draftloop.backends.architecture import read_architecture
from draftloop.backends.base import Capabilities
from draftloop.backends.mlx.memory import memory_errors
from draftloop.errors import BackendUnavailable, ModelUnreadable

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import Lora
    from draftloop.backends.mlx.model import MlxModel
    from draftloop.backends.mlx.training import MlxTrainer
    from draftloop.backends.training import TrainerSettings
    from draftloop.backends.vocabulary import CutVocabulary

SWITCH = "DRAFTLOOP_MLX_COMPILE"
"""Environment: 0 builds every step's graph anew, to compare."""


class MlxBackend:
    """MLX on one device.

    Args:
        device: `auto` (the GPU where this build has one), `cpu` or `gpu`.

    Raises:
        BackendUnavailable: another word, or a GPU that is not there.
    """

    def __init__(self, device: str = "auto") -> None:
        if device not in ("auto", "cpu", "gpu"):
            raise BackendUnavailable(f"device {device!r} is unknown", remedy="Choose auto, cpu or gpu.")
        has_gpu = mx.is_available(mx.gpu)
        if device == "gpu" and not has_gpu:
            raise BackendUnavailable("MLX finds no GPU here", remedy="Choose device auto or cpu.")
        self._device = mx.Device(mx.gpu if has_gpu and device != "cpu" else mx.cpu)
        # On a processor MLX compiles what it has fused by the machine's own compiler, if there is one.
        can_compile = self._device == mx.Device(mx.gpu) or shutil.which("g++") is not None
        self._compiled = can_compile and os.environ.get(SWITCH) != "0"

    def capabilities(self) -> Capabilities:
        """What it can do here."""
        name, memory_bytes = f"cpu, {os.cpu_count()} threads", None
        if self._device == mx.Device(mx.gpu):
            info = mx.device_info(self._device)
            name = str(info.get("device_name", "gpu"))
            if not mx.metal.is_available() and "total_memory" in info:
                memory_bytes = int(info["total_memory"])
        return Capabilities(
            backend="mlx",
            version=version("mlx"),
            device=f"{name}, compiled steps" if self._compiled else name,
            dtypes=("float32", "float16", "bfloat16"),
            quantized_bits=(4,),
            device_memory_bytes=memory_bytes,
        )

    def load(
        self, folder: Path, *, max_kv_cache_tokens: int, vocabulary: CutVocabulary | None = None
    ) -> MlxModel:
        """Load a folder through mlx-lm; 4-bit weights stay packed.

        Raises:
            ModelUnreadable: what mlx-lm refuses, in its words.
            ValueError: `vocabulary` has ids that the model has not.
        """
        # mlx-lm imports transformers, which takes seconds.
        from draftloop.backends.mlx.model import MlxModel

        architecture = read_architecture(folder)
        if vocabulary is not None:
            vocabulary.check_fits(architecture.vocab_size)
        with mx.stream(self._device):
            network = _load_network(folder, architecture)
        return MlxModel(
            architecture,
            network,
            self._device,
            max_kv_cache_tokens,
            vocabulary,
            compiled=self._compiled,
        )

    def new_trainer(self, folder: Path, lora: Lora, settings: TrainerSettings) -> MlxTrainer:
        """A trainer with a network of its own, so that a draft loaded from the same folder is untouched.

        Raises:
            ModelUnreadable: what mlx-lm refuses, or `lora` does not fit the model.
            OutOfMemory: the model does not fit once more.
        """
        from draftloop.backends.mlx.adapter import check_fits
        from draftloop.backends.mlx.training import MlxTrainer

        architecture = read_architecture(folder)
        check_fits(architecture, lora)
        with mx.stream(self._device):
            network = _load_network(folder, architecture)
        return MlxTrainer(architecture, network, lora, settings, self._device)

    def clear_cache(self) -> None:
        """Give back the buffers that MLX keeps for reuse."""
        mx.clear_cache()


def _load_network(folder: Path, architecture: Architecture) -> Any:
    """mlx-lm's module with its weights in memory."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache
    from mlx_lm.utils import load_model

    try:
        with memory_errors(f"loading {folder}", "Choose a smaller model, or close other programs."):
            network, _ = load_model(folder, model_config=_model_config(architecture))
            # An array that is still lazy can be computed only by the thread that made it, and `load_model`
            # leaves some so: rotary tables are no parameters.
            mx.eval([value for module in network.modules() for value in _arrays(module)])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelUnreadable(
            f"MLX cannot load {folder}: {error}", remedy="Pull the model again, or choose another one."
        ) from error
    if any(type(layer) is not KVCache for layer in make_prompt_cache(network)):
        raise ModelUnreadable(
            f"{folder} attends through a sliding window, which cannot forget guesses",
            remedy="Choose a model with full attention.",
        )
    return network


def _arrays(module: Any) -> list[mx.array]:
    return [value for value in module.values() if isinstance(value, mx.array)]


def _model_config(a: Architecture) -> dict[str, Any]:
    """What `read_architecture` understood, in mlx-lm's words: its own defaults differ from the format's."""
    config: dict[str, Any] = {
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": a.max_position_tokens,
        "rms_norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope_theta,
        "tie_word_embeddings": a.tied_embeddings,
        "attention_bias": a.attention_bias,
        "rope_scaling": None,
    }
    scaling = a.rope_scaling
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_tokens,
        }
    return config
