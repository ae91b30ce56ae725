"""Tiny tokenizers of every kind whose decoding differs, written as model folders.

Contract: each function writes `tokenizer.json` and `tokenizer_config.json` into a folder and returns it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("l", "l"), ("Ã", "©"), ("Ã", "¤"), ("!", "ð"), ("Ł", "ĺ"))
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "Functions:{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}"
    "{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that knows tools: Hermes' kind of calls, and results as turns of their own."""


def write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_level(
    folder: Path,
    *,
    merges: Sequence[tuple[str, str]] = MERGES,
    specials: Sequence[str] = SPECIALS,
    normal: Sequence[str] = (),
    add_prefix_space: bool = False,
    lowercase: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    eos: str | None = "<|endoftext|>",
) -> Path:
    """GPT-2's kind: 256 byte tokens, merges over them, then special and other added tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in normal])
    extra = {"chat_template": chat_template} if chat_template else {}
    return write(folder, tokenizer, **({"eos_token": eos} if eos else {}), **extra)


def byte_fallback(folder: Path) -> Path:
    """Llama 2's kind: words of ▁ and letters, bytes for the rest, one leading space dropped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdé.�", "▁a", "bc"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a"), ("b", "c")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return write(folder, tokenizer, eos_token="</s>", bos_token="<s>")


def metaspace(folder: Path) -> Path:
    """T5's kind: ▁ begins a word, and the text's first one is dropped."""
    vocab = {token: index for index, token in enumerate(["<unk>", "</s>", *"▁abc.", "▁a", "bc"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a"), ("b", "c")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return write(folder, tokenizer, eos_token="</s>")


def word_piece(folder: Path) -> Path:
    """BERT's kind: a space before every token without ##."""
    vocab = {token: index for index, token in enumerate(["[UNK]", "a", "b", "##c", "##d", ".", "STOP"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]"])
    return write(folder, tokenizer)
