"""What a model folder's `config.json` says of the shapes, for every backend and for the memory plan.

Contract: parses the Llama skeleton (Llama, SmolLM2, Mistral, Qwen2, Qwen3) and MLX's affine
quantization; refuses anything else by name. Must not know any framework.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
SUPPORTED_GROUP_SIZES = (32, 64, 128)
SUPPORTED_ACTIVATIONS = ("silu", "swish")
"""Two names of one function."""

_MAX_LAYERS = 1000
"""Several times what any published model has; a damaged number must not fill the memory with names."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """MLX affine quantization: w ≈ scale · code + bias, one pair for each `group_size` inputs."""

    group_size: int
    bits: int

    @property
    def bits_per_weight(self) -> float:
        """Storage of one weight, its share of the 16-bit scale and bias included."""
        return self.bits + 32 / self.group_size


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency-dependent scaling (Llama 3.1 model card), or a plain factor (`linear`)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shapes of one decoder of the Llama skeleton.

    Attributes:
        model_type: `llama`, `mistral`, `qwen2` or `qwen3`.
        vocab_size: V, rows of the output head; may exceed the tokenizer's vocabulary by padding.
        hidden_size: D.
        num_layers: L.
        num_heads: H query heads.
        num_kv_heads: G key/value heads; H is a multiple of G.
        head_dim: width of one head.
        intermediate_size: F, width of the gated MLP.
        max_position_tokens: longest context that the model was made for.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary embedding.
        rope_scaling: how it is stretched, if it is.
        tied_embeddings: the output head is the embedding.
        attention_bias: q, k and v carry a bias (Qwen2).
        qk_norm: RMSNorm on each head of q and k (Qwen3).
        quantization: of the linear layers; None where they are dense.
        dtype: the checkpoint's own (`bfloat16`, `float16`, `float32`).
        eos_token_ids: as the config names them; the tokenizer and generation config may add some.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_tokens: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    quantization: Quantization | None
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each linear module of one layer, by the name LoRA's `target_modules` uses."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (q, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "o_proj": (d, q),
            "gate_proj": (f, d),
            "up_proj": (f, d),
            "down_proj": (d, f),
        }

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to the KV cache, all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def read_architecture(folder: Path) -> Architecture:
    """Parse `folder/config.json`.

    Raises:
        ModelUnreadable: the file is missing, is not JSON, or describes a model that no backend runs.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelUnreadable(
            f"{folder} has no config.json", remedy="Name a folder with config.json and *.safetensors."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnreadable(
            f"{path} cannot be read: {error}", remedy="Check the file, or pull the model again."
        ) from error
    if not isinstance(config, dict):
        raise ModelUnreadable(f"{path} holds no JSON object", remedy="Pull the model again.")
    try:
        architecture = _parse(config)
        _refuse_impossible(architecture)
    except ModelUnreadable as error:
        raise ModelUnreadable(f"{path}: {error.what}", remedy=error.remedy) from error
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ModelUnreadable(
            f"{path} lacks or misstates {error}", remedy="Pull the model again, or choose another one."
        ) from error
    return architecture


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a dense checkpoint, by its name in the file.

    Matrices are [out, in]; they are exactly the tensors that a quantized checkpoint stores in three parts.
    """
    a = architecture
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (a.vocab_size, a.hidden_size),
        "model.norm.weight": (a.hidden_size,),
    }
    if not a.tied_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (a.hidden_size,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (a.hidden_size,)
        for name, shape in a.linear_shapes.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            shapes[f"{prefix}.{block}.{name}.weight"] = shape
        if a.attention_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{prefix}.self_attn.{name}.bias"] = (a.linear_shapes[name][0],)
        if a.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (a.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (a.head_dim,)
    return shapes


def _parse(config: Mapping[str, Any]) -> Architecture:
    model_type = str(config.get("model_type"))
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelUnreadable(
            f"model_type {model_type!r} is not supported",
            remedy=f"Choose a model of type {', '.join(SUPPORTED_MODEL_TYPES)}.",
        )
    activation = config.get("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        raise ModelUnreadable(
            f"hidden_act {activation!r} is not supported",
            remedy=f"Choose a model with {' or '.join(SUPPORTED_ACTIVATIONS)}.",
        )
    rope = _object(config, "rope_parameters")
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    eos = config.get("eos_token_id")
    return Architecture(
        model_type=model_type,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate_size=int(config["intermediate_size"]),
        max_position_tokens=_max_position_tokens(config),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(_object(config, "rope_scaling") or rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", model_type == "qwen2")),
        qk_norm=model_type == "qwen3",
        quantization=_quantization(config),
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32"),
        eos_token_ids=() if eos is None else tuple(int(i) for i in (eos if isinstance(eos, list) else [eos])),
    )


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object under `key`; empty where it is absent or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {value!r:.80} is no JSON object")
    return value


def _refuse_impossible(a: Architecture) -> None:
    sizes = {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.intermediate_size,
        "max_position_embeddings": a.max_position_tokens,
    }
    for key, size in sizes.items():
        if size < 1 or (key == "num_hidden_layers" and size > _MAX_LAYERS):
            raise ValueError(f"{key}: {size}")
    if a.num_heads % a.num_kv_heads:
        raise ValueError(f"num_key_value_heads: {a.num_kv_heads} for {a.num_heads} heads")


def _max_position_tokens(config: Mapping[str, Any]) -> int:
    longest = int(config.get("max_position_embeddings", 4096))
    window = config.get("sliding_window")
    # Attention here is full; up to the window's length a sliding window is the same.
    if window is not None and config.get("use_sliding_window", True):
        return min(longest, int(window))
    return longest


def _rope_scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(values["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(values["factor"]),
            low_freq_factor=float(values["low_freq_factor"]),
            high_freq_factor=float(values["high_freq_factor"]),
            original_max_tokens=int(values["original_max_position_embeddings"]),
        )
    raise ModelUnreadable(
        f"rope scaling {kind!r} is not supported",
        remedy="Choose a model with default, linear or llama3 rope.",
    )


def _quantization(config: Mapping[str, Any]) -> Quantization | None:
    values = _object(config, "quantization")
    if not values:
        method = _object(config, "quantization_config").get("quant_method")
        if method is None:
            return None
        raise ModelUnreadable(
            f"quantization {method!r} is not supported",
            remedy="Choose an MLX 4-bit folder (mlx-community/…-4bit), a GGUF file, or dense safetensors.",
        )
    overrides = sorted(key for key, value in values.items() if isinstance(value, dict | bool))
    if overrides:
        raise ModelUnreadable(
            f"mixed quantization ({overrides[0]} has its own settings) is not supported",
            remedy="Choose a checkpoint with one bit width for all layers.",
        )
    quantization = Quantization(group_size=int(values["group_size"]), bits=int(values["bits"]))
    mode = values.get("mode", "affine")
    if mode != "affine" or quantization.bits != 4 or quantization.group_size not in SUPPORTED_GROUP_SIZES:
        raise ModelUnreadable(
            f"{mode} {quantization.bits}-bit weights in groups of {quantization.group_size} are unsupported",
            remedy=f"Choose affine 4-bit with a group of {', '.join(map(str, SUPPORTED_GROUP_SIZES))}.",
        )
    return quantization


def rope_inverse_frequencies(architecture: Architecture) -> tuple[float, ...]:
    """1/wavelength of each rotary pair, [head_dim / 2] (Su et al. 2021, eq. 15; Llama 3.1 for `llama3`)."""
    import math

    dim = architecture.head_dim
    plain = [architecture.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
    scaling = architecture.rope_scaling
    if scaling is None:
        return tuple(plain)
    if scaling.kind == "linear":
        return tuple(f / scaling.factor for f in plain)
    longest = scaling.original_max_tokens / scaling.low_freq_factor
    shortest = scaling.original_max_tokens / scaling.high_freq_factor
    stretched = []
    for f in plain:
        wavelength = 2 * math.pi / f
        if wavelength < shortest:
            stretched.append(f)
        elif wavelength > longest:
            stretched.append(f / scaling.factor)
        else:
            share = (scaling.original_max_tokens / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            stretched.append((1 - share) * f / scaling.factor + share * f)
    return tuple(stretched)
