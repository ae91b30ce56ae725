"""Toy models: whole Hugging Face folders, a few hundred kilobytes each, written in milliseconds.

Contract: `write_toy_folder` writes one model with its tokenizer, `write_toy_pair` a target and a draft that
resembles it, so that acceptance is neither 0 nor 1. The same arguments give the same bytes. Weights are
scaled so that distributions are far from uniform and greedy text does not end at once. Knows the file
formats only: no backend, no framework but numpy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Tensors = dict[str, NDArray[Any]]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("Ġ", "t"), ("o", "n"), ("a", "n"))
TOKENIZER_SIZE = 256 + len(MERGES) + len(SPECIAL_TOKENS)
"""Ids that the tokenizer knows; a model's `vocab_size` may exceed it by padding."""

ENDOFTEXT_ID, IM_START_ID, EOS_ID = range(TOKENIZER_SIZE - 3, TOKENIZER_SIZE)
"""The special tokens' ids; `EOS_ID` is that of <|im_end|>."""

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a toy.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QUANTIZED_GROUP_SIZE = 32
LOGIT_SPREAD = 2.6
LAYER_GAIN = 1.5

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, slots=True)
class Toy:
    """Shapes and kind of one toy."""

    model_type: str = "llama"
    seed: int = 0
    vocab_size: int = 272
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    intermediate_size: int = 128
    tied: bool = False
    quantized: bool = False
    dtype: str = "float32"
    rope_scaling: dict[str, Any] | None = None
    max_position_tokens: int = 4096

    @property
    def width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads


def write_toy_folder(folder: Path, **options: Any) -> Path:
    """Write one toy model; `options` are the fields of `Toy`. Returns `folder`."""
    toy = Toy(**options)
    _write(folder, toy, _random_tensors(toy))
    return folder


def write_toy_pair(
    folder: Path, *, noise: float = 0.08, draft_vocab_size: int | None = None, **options: Any
) -> tuple[Path, Path]:
    """Write `folder/target` and `folder/draft`: the draft is the target with `noise` on every weight.

    Args:
        folder: where both go.
        noise: standard deviation of the disturbance over that of the weight; 0 makes the two equal.
        draft_vocab_size: rows of the draft's head, where they differ from the target's by padding.
        **options: fields of `Toy`, of both.

    Returns:
        The target's folder and the draft's.
    """
    target = Toy(**options)
    tensors = _random_tensors(target)
    _write(folder / "target", target, tensors)
    draft = Toy(**{**options, "vocab_size": draft_vocab_size or target.vocab_size})
    _write(folder / "draft", draft, _resized(_disturbed(tensors, noise, target.seed + 1), draft.vocab_size))
    return folder / "target", folder / "draft"


def quantize_affine(weight: NDArray[np.float32], group_size: int) -> dict[str, NDArray[Any]]:
    """MLX's affine 4-bit layout of `weight` [out, in]: eight codes a word, the first in the lowest bits."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group_size, group_size)
    low = groups.min(axis=-1)
    scale = np.maximum((groups.max(axis=-1) - low) / 15, 1e-7)
    codes = np.clip(np.round((groups - low[..., None]) / scale[..., None]), 0, 15).astype(np.uint32)
    words = codes.reshape(rows, columns // 8, 8) << (4 * np.arange(8, dtype=np.uint32))
    return {"weight": words.sum(axis=-1, dtype=np.uint32), "scales": scale, "biases": low}


def _random_tensors(toy: Toy) -> Tensors:
    random = np.random.default_rng(toy.seed)

    def normal(rows: int, columns: int, gain: float) -> NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    def norm(width: int) -> NDArray[np.float32]:
        return (1 + 0.1 * random.standard_normal(width)).astype(np.float32)

    hidden, q, kv = toy.hidden_size, toy.num_heads * toy.width, toy.num_kv_heads * toy.width
    head = normal(toy.vocab_size, hidden, LOGIT_SPREAD)
    head[TOKENIZER_SIZE - 3 : TOKENIZER_SIZE] *= 0.5
    head[TOKENIZER_SIZE:] = 0
    tensors: Tensors = {"model.embed_tokens.weight": head}
    if not toy.tied:
        tensors["lm_head.weight"] = head
        tensors["model.embed_tokens.weight"] = normal(toy.vocab_size, hidden, 8.0)
    for i in range(toy.num_layers):
        prefix = f"model.layers.{i}"
        shapes = {"q_proj": (q, 1.5), "k_proj": (kv, 1.5), "v_proj": (kv, LAYER_GAIN)}
        for name, (rows, gain) in shapes.items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = normal(rows, hidden, gain)
            if toy.model_type == "qwen2":
                tensors[f"{prefix}.self_attn.{name}.bias"] = normal(1, rows, 3.0)[0]
        tensors[f"{prefix}.self_attn.o_proj.weight"] = normal(hidden, q, LAYER_GAIN)
        if toy.model_type == "qwen3":
            tensors[f"{prefix}.self_attn.q_norm.weight"] = norm(toy.width)
            tensors[f"{prefix}.self_attn.k_norm.weight"] = norm(toy.width)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = normal(toy.intermediate_size, hidden, LAYER_GAIN)
        tensors[f"{prefix}.mlp.up_proj.weight"] = normal(toy.intermediate_size, hidden, LAYER_GAIN)
        tensors[f"{prefix}.mlp.down_proj.weight"] = normal(hidden, toy.intermediate_size, LAYER_GAIN)
        tensors[f"{prefix}.input_layernorm.weight"] = norm(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm(hidden)
    tensors["model.norm.weight"] = norm(hidden)
    return tensors


def _disturbed(tensors: Tensors, noise: float, seed: int) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        name: (value + noise * value.std() * random.standard_normal(value.shape)).astype(np.float32)
        for name, value in tensors.items()
    }


def _resized(tensors: Tensors, vocab_size: int) -> Tensors:
    resized = dict(tensors)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        rows = np.zeros((vocab_size, tensors[name].shape[1]), np.float32)
        kept = min(vocab_size, len(tensors[name]))
        rows[:kept] = tensors[name][:kept]
        resized[name] = rows
    return resized


def _write(folder: Path, toy: Toy, tensors: Tensors) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(toy), indent=2), encoding="utf-8")
    if toy.quantized:
        tensors = _quantized(tensors)
    stored = {
        name: np.ascontiguousarray(value if value.dtype == np.uint32 else value.astype(DTYPES[toy.dtype]))
        for name, value in tensors.items()
    }
    (folder / "model.safetensors").write_bytes(save(stored, {"format": "mlx"}))
    _write_tokenizer(folder)


def _quantized(tensors: Tensors) -> Tensors:
    """Every matrix (the embedding too) becomes weight, scales, biases; vectors stay as they are."""
    quantized: Tensors = {}
    for name, value in tensors.items():
        if value.ndim == 1:
            quantized[name] = value
            continue
        for part, array in quantize_affine(value, QUANTIZED_GROUP_SIZE).items():
            quantized[f"{name.removesuffix('weight')}{part}"] = array
    return quantized


def _config(toy: Toy) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [f"{toy.model_type.capitalize()}ForCausalLM"],
        "model_type": toy.model_type,
        "vocab_size": toy.vocab_size,
        "hidden_size": toy.hidden_size,
        "num_hidden_layers": toy.num_layers,
        "num_attention_heads": toy.num_heads,
        "num_key_value_heads": toy.num_kv_heads,
        "head_dim": toy.width,
        "intermediate_size": toy.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": toy.max_position_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": toy.tied,
        "torch_dtype": toy.dtype,
        "bos_token_id": ENDOFTEXT_ID,
        "eos_token_id": EOS_ID,
    }
    if toy.rope_scaling is not None:
        config["rope_scaling"] = toy.rope_scaling
    if toy.quantized:
        config["quantization"] = {"group_size": QUANTIZED_GROUP_SIZE, "bits": 4}
    return config


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
