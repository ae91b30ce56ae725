"""A GGUF file's metadata as a `config.json`, and its tensors' names in Hugging Face's words.

Contract: the architectures `llama`, `qwen2` and `qwen3`, dense ones; anything else is refused by name.
Must not know how tensors are stored.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.errors import ModelUnreadable
from draftloop.models.gguf_tokenizer import end_token_ids, special_ids

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA3_ORIGINAL_TOKENS = 8192
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_REMEDY = "Choose a GGUF file of a dense Llama, Mistral, Qwen2 or Qwen3 model."


def hf_name(gguf_name: str) -> str:
    """Hugging Face's name of the tensor that GGUF calls `gguf_name`.

    Raises:
        ModelUnreadable: no supported architecture has such a tensor.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    layer, module, kind = match.groups() if match else (None, gguf_name, "")
    name = _TOP_NAMES.get(module) if layer is None else _LAYER_NAMES.get(module)
    if name is None:
        raise ModelUnreadable(f"the tensor {gguf_name} belongs to no supported architecture", remedy=_REMEDY)
    return f"{name}.{kind}" if layer is None else f"model.layers.{layer}.{name}.{kind}"


def hf_config(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    *,
    tied: bool,
    rope_factors: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """The `config.json` of a dense bf16 model; the caller adds the quantization.

    Args:
        metadata: the file's.
        tensor_names: GGUF names of its tensors.
        tied: the output head is the embedding.
        rope_factors: the tensor `rope_freqs.weight`, where there is one: what Llama 3 divides each
            rotary pair's frequency by, [head_dim / 2].

    Raises:
        ModelUnreadable: an architecture or a rope scaling that is not supported, or a value that is missing.
    """
    architecture = str(metadata.get("general.architecture"))
    if architecture not in _CLASSES:
        raise ModelUnreadable(f"the GGUF architecture {architecture!r} is not supported", remedy=_REMEDY)
    if metadata.get(f"{architecture}.expert_count", 0):
        raise ModelUnreadable("a mixture of experts is not supported", remedy=_REMEDY)
    try:
        config = _shapes(metadata, architecture)
        config |= {
            "architectures": [_CLASSES[architecture]],
            "attention_bias": "blk.0.attn_q.bias" in tensor_names,
            "tie_word_embeddings": tied,
        }
        window = int(metadata.get(f"{architecture}.attention.sliding_window", 0))
        if window:
            config["sliding_window"] = window
        scaling = _rope_scaling(metadata, architecture, config, rope_factors)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelUnreadable(f"the GGUF file lacks or misstates {error}", remedy=_REMEDY) from error
    if scaling:
        config["rope_scaling"] = scaling
    return config


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`generation_config.json`: every token that ends an answer."""
    config: dict[str, Any] = {
        f"{name}_token_id": i for name, i in special_ids(metadata).items() if name != "unk"
    }
    ends = end_token_ids(metadata)
    if ends:
        config["eos_token_id"] = ends
    return config


def _shapes(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    def get(key: str) -> Any:
        return metadata[f"{architecture}.{key}"]

    heads = int(get("attention.head_count"))
    hidden = int(get("embedding_length"))
    ids = special_ids(metadata)
    return {
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.get(f"{architecture}.attention.head_count_kv", heads)),
        "head_dim": int(metadata.get(f"{architecture}.attention.key_length", hidden // heads)),
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(metadata.get(f"{architecture}.rope.freq_base", 10000.0)),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "torch_dtype": "bfloat16",
        **{f"{name}_token_id": ids[name] for name in ("bos", "eos") if name in ids},
    }


def _rope_scaling(
    metadata: Mapping[str, Any],
    architecture: str,
    config: Mapping[str, Any],
    factors: NDArray[np.float32] | None,
) -> dict[str, Any] | None:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if factors is not None:
        return _llama3_scaling(config, factors)
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(metadata[f"{architecture}.rope.scaling.factor"])}
    if kind != "none":
        raise ModelUnreadable(f"rope scaling {kind!r} is not supported", remedy=_REMEDY)
    return None


def _llama3_scaling(config: Mapping[str, Any], factors: NDArray[np.float32]) -> dict[str, Any]:
    """Llama 3.1's scaling, which a GGUF keeps only as its result; its factor is the largest one.

    The bounds that every published Llama 3 uses are assumed, and checked to give the same numbers.
    """
    factor = float(factors.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_TOKENS,
    }
    dim = config["head_dim"]
    frequencies = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    turns = _LLAMA3_ORIGINAL_TOKENS * frequencies / (2 * np.pi)
    share = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelUnreadable("the rope factors in rope_freqs.weight are not Llama 3's", remedy=_REMEDY)
    return scaling


def _short(value: float) -> float:
    """A float32 as people write it: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))
