"""The tokenizer that a GGUF file's metadata describes, written as `tokenizer.json` and its config.

Contract: byte-level BPE (`gpt2`) with the pre-tokenizers named below, and SentencePiece BPE (`llama`);
anything else is refused by name, because a tokenizer that is nearly right spoils every answer silently.
Built with the tokenizers library, not transformers: opening a GGUF file there needs PyTorch, which
Apple-silicon machines need not have. Its `convert_gguf_tokenizer` alone (5.23) does not need it, but leaves
out Qwen2's NFC normalizer and SmolLM2's splitting of digits: of 498 texts of code, Unicode, digits and
whitespace it encoded 237 (Qwen2.5) and 52 (SmolLM2) differently. Must not know tensors.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""ggml's token types that matter here; unused ones pad the vocabulary to the embedding's rows."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
_SPLITS = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
_DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_PLAIN = ("gpt-2", "default")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Vocabularies made on NFC text."""

_END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>")
"""Control tokens that end an answer wherever they exist, the one the file names apart (llama.cpp's rule)."""

_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`.

    Raises:
        ModelUnreadable: a kind of tokenizer that is not supported, or values that contradict each other.
    """
    try:
        tokenizer = _build(metadata)
        config = _config(metadata)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ModelUnreadable(
            f"the GGUF file's tokenizer lacks or misstates {error}",
            remedy="Choose another file of this model.",
        ) from error
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
    )


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids of bos, eos, unk and pad, as far as the file names them."""
    values = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    return {name: int(value) for name, value in values.items() if value is not None}


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every token that ends an answer; the file's own eos first."""
    tokens, types = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    control = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL
    }
    found = [int(i) for i in named if i is not None] + [
        control[text] for text in _END_TEXTS if text in control
    ]
    return list(dict.fromkeys(found))


def _build(metadata: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import AddedToken, processors

    model = metadata["tokenizer.ggml.model"]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{len(types)} token types for {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    if model == "gpt2":
        tokenizer = _byte_level(vocabulary, metadata)
    elif model == "llama":
        tokenizer = _sentencepiece(vocabulary, tokens, metadata)
    else:
        raise ModelUnreadable(
            f"the GGUF file's tokenizer {model!r} is not supported",
            remedy="Choose a file with a BPE tokenizer (gpt2 or llama), or a folder of safetensors.",
        )
    special = {tokens[i] for i in special_ids(metadata).values()}
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == _CONTROL or token in special)
            tokenizer.add_tokens([added])
    if _adds_bos(metadata):
        bos = special_ids(metadata)["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _byte_level(vocabulary: dict[str, int], metadata: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "default")
    merges = [_pair(merge, vocabulary) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split: pre_tokenizers.PreTokenizer
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
    elif name in _DIGIT_SPLITTING:
        split = pre_tokenizers.Digits(individual_digits=True)
    elif name in _PLAIN:
        split = pre_tokenizers.Sequence([])
    else:
        raise ModelUnreadable(
            f"the GGUF file's pre-tokenizer {name!r} is not supported",
            remedy=f"Choose one of {', '.join((*_SPLITS, *_DIGIT_SPLITTING, *_PLAIN))}, or safetensors.",
        )
    bytes_of_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _SPLITS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_text])
    if name in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    vocabulary: dict[str, int], tokens: Sequence[str], metadata: Mapping[str, Any]
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores: list[float] = metadata["tokenizer.ggml.scores"]
    unknown = special_ids(metadata).get("unk")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_of(vocabulary, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    strip: list[decoders.Decoder] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        strip.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_of(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: any split of a piece into two pieces is one, the best score first."""
    merges = []
    for piece, index in vocabulary.items():
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-scores[index], pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


def _pair(merge: str, vocabulary: Mapping[str, int]) -> tuple[str, str]:
    left, right = merge.split(" ")
    if not {left, right, left + right} <= vocabulary.keys():
        raise ValueError(f"the merge {merge!r}, whose pieces are no tokens")
    return left, right


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """What the file says; without a word, SentencePiece and Llama 3 add it (llama.cpp's defaults)."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    by_habit = (
        metadata["tokenizer.ggml.model"] == "llama"
        or _SPLITS.get(metadata.get("tokenizer.ggml.pre", "")) == _LLAMA3
    )
    return by_habit and "bos" in special_ids(metadata)


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    architecture = metadata["general.architecture"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata[f"{architecture}.context_length"]),
        "add_bos_token": _adds_bos(metadata),
    }
    config |= {f"{name}_token": tokens[i] for name, i in special_ids(metadata).items()}
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config
