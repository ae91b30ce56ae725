"""A model folder's tokenizer and chat template, and the proof that two tokenizers are one.

Contract: text to token ids and back, exactly as the model's own files say. Special tokens written inside a
message (`<|im_end|>` in a user's text) become that special token, as in transformers: a prompt is trusted.
Must not know the network (only local folders are read), sampling, or when to stop.
"""

from __future__ import annotations

import codecs
import json
import logging
import warnings
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from draftloop.errors import InputError, ModelUnreadable, TokenizerMismatch
from draftloop.models.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_PROBE = (
    "Hello, World! it's 12345 naïve e\u0301 \u00a0x\u200d  \t\r\n\n  def f(x):\n\treturn x[0]+=1 "
    "日本語 привет العربية \U0001f469\u200d\U0001f4bb ﬁ Ⅻ ½ …'re'LL <|x|> https://a.b/c?d=e&f"
)
"""Text on which two pre-tokenizers or normalizers that differ in substance give different ids."""

_MARK = "draftloop"
"""Content of the rendered assistant message from which the end-of-turn token is read."""


class Tokenizer:
    """Text ↔ token ids of one model. Make it with `Tokenizer.load`."""

    def __init__(self, transformers_tokenizer: Any, *, name: str, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = transformers_tokenizer
        self._backend = transformers_tokenizer.backend_tokenizer
        self._name = name
        self._configured_eos = eos_token_ids

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a model folder, without running any code of its own.

        Raises:
            ModelUnreadable: there is no tokenizer, it is damaged, or it has no fast form.
        """
        if not (folder / "tokenizer.json").is_file():
            raise ModelUnreadable(
                f"{folder} has no tokenizer.json", remedy="Pull the model again, or choose another one."
            )
        with _quiet():
            # The class that reads tokenizer.json as it is; AutoTokenizer would rebuild it by model type.
            from transformers import PreTrainedTokenizerFast

            try:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            except Exception as error:  # transformers and its Rust core raise anything, bare Exception too
                raise ModelUnreadable(
                    f"the tokenizer in {folder} cannot be read: {_first_line(error)}",
                    remedy="Pull the model again, or choose another one.",
                ) from error
        eos = {tokenizer.eos_token_id} - {None}
        eos |= _eos_of(folder, "generation_config.json") | _eos_of(folder, "config.json")
        return cls(tokenizer, name=str(folder), eos_token_ids=frozenset(eos))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's own vocabulary may be padded beyond it."""
        return max(self._ids_to_tokens, default=-1) + 1

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer.

        The tokenizer's own, those of `generation_config.json` and `config.json`, and the token with which
        the chat template closes an assistant's turn.
        """
        return self._configured_eos | self._end_of_turn()

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that stand for no text: they frame messages, or end them."""
        return frozenset(self._special_tokens) | self.eos_token_ids

    def to_json(self) -> str:
        """All of it, in the form of `tokenizer.json`."""
        return str(self._backend.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`, with nothing added before or after.

        With `add_special_tokens` the tokenizer adds what it puts around a text of its own accord, which is
        a BOS token for some models and nothing for others; a text that begins with BOS gets no second one.
        """
        token_ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        if not add_special_tokens or token_ids[:1] == [self._tokenizer.bos_token_id]:
            return token_ids
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`; special tokens and ids beyond the vocabulary have none."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def chat_tokens(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, framed by the model's chat template. From any thread.

        Args:
            messages: its turns. A template may add a system message of its own where none is given.
            tools: functions that may be called, as the OpenAI API describes them; a template that knows
                nothing of tools leaves them out (`tool_calls.call_format_of` tells).
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            ModelUnreadable: the model has no chat template, or a broken one.
            InputError: the template refuses these messages, for example a system message; or a call's
                arguments are nested too deeply.
        """
        return self.encode(self.chat_text(messages, tools=tools, add_generation_prompt=add_generation_prompt))

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at this token: it is known and not special."""
        return token_id not in self._special_tokens and self._backend.id_to_token(token_id) is not None

    def ends_midway(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of `token_ids`, all of which have text, may still change with the next token.

        It may where the last character's UTF-8 bytes are incomplete (byte-level BPE), or after a byte
        token of a byte-fallback vocabulary, whose runs are decoded as a whole.
        """
        if not token_ids:
            return False
        if "ByteFallback" in self._decoders and _is_byte_token(self._backend.id_to_token(token_ids[-1])):
            return True
        if "ByteLevel" not in self._decoders:
            return False
        tail = b""
        for token_id in reversed(token_ids):
            tail = self._byte_level_bytes(token_id) + tail
            if len(tail) >= 4:
                break
        return _is_incomplete(tail)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; of one that stands for no text, its name's."""
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_tokens:
            return token.encode()
        if "ByteLevel" in self._decoders:
            return self._byte_level_bytes(token_id)
        if "ByteFallback" in self._decoders and _is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """What `chat_tokens` makes tokens of."""
        from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

        if not self._tokenizer.chat_template:
            raise ModelUnreadable(
                f"{self._name} has no chat template", remedy="Choose an instruct or chat model."
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [message.as_template_reads_it() for message in messages],
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except RecursionError:
            raise InputError(
                "these messages are nested too deeply",
                remedy="Call functions with arguments that are nested less deeply.",
            ) from None
        except (TemplateSyntaxError, UndefinedError, ValueError, TypeError, KeyError) as error:
            raise ModelUnreadable(
                f"the chat template of {self._name} is broken: {_first_line(error)}",
                remedy="Pull the model again, or choose another one.",
            ) from error
        except TemplateError as error:
            system = any(m.role == "system" for m in messages)
            raise InputError(
                f"the chat template of {self._name} refuses these messages: {_first_line(error)}",
                remedy='Run with --set chat.system_message="".' if system else "Begin with a user's message.",
            ) from error

    def _end_of_turn(self) -> frozenset[int]:
        """The special token that follows an assistant's message, if the template writes one."""
        if not self._tokenizer.chat_template:
            return frozenset()
        try:
            text = self.chat_text(
                [Message("user", "?"), Message("assistant", _MARK)], add_generation_prompt=False
            )
        except InputError:
            return frozenset()  # met again, and told, when a real conversation is rendered
        after = self.encode(text.rpartition(_MARK)[2])
        return frozenset([i for i in after if i in self._special_tokens][:1])

    @cached_property
    def _ids_to_tokens(self) -> Mapping[int, str]:
        return {token_id: token for token, token_id in self._backend.get_vocab().items()}

    @cached_property
    def _added_tokens(self) -> Mapping[int, Any]:
        return dict(self._backend.get_added_tokens_decoder())

    @cached_property
    def _special_tokens(self) -> Mapping[int, str]:
        return {token_id: token.content for token_id, token in self._added_tokens.items() if token.special}

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Names of the steps that turn tokens into text."""
        return frozenset(_step_names(_state(self._backend.decoder)))

    @cached_property
    def _byte_level_alphabet(self) -> Mapping[str, int]:
        return _byte_level_alphabet()

    def _byte_level_bytes(self, token_id: int) -> bytes:
        token: str = self._backend.id_to_token(token_id)
        try:
            return bytes(self._byte_level_alphabet[c] for c in token)
        except KeyError:
            return token.encode("utf-8")  # an added token: it is not spelt in the alphabet


def check_tokenizers_agree(target: Tokenizer, draft: Tokenizer) -> None:
    """Refuse a pair whose token ids do not mean the same.

    Compares every id, which tokens are special, BPE's merges, and how a text full of odd characters is
    split. A model's padding beyond the tokenizer's vocabulary does not matter.

    Raises:
        TokenizerMismatch: with the first difference.
    """
    difference = (
        _vocabulary_difference(target, draft)
        or _first_difference(target._special_tokens, draft._special_tokens, "special token")
        or _splitting_difference(target, draft)
    )
    if difference:
        raise TokenizerMismatch(
            f"target and draft have different tokenizers: {difference}",
            remedy="Choose a draft of the target's own family.",
        )


def _first_difference(target: Mapping[int, str], draft: Mapping[int, str], noun: str) -> str | None:
    if target == draft:
        return None
    lowest = min(i for i in target.keys() | draft.keys() if target.get(i) != draft.get(i))
    here, there = (
        f"the {noun} {tokens[lowest]!r}" if lowest in tokens else f"no {noun}" for tokens in (target, draft)
    )
    return f"id {lowest} is {here} in the target and {there} in the draft"


def _vocabulary_difference(target: Tokenizer, draft: Tokenizer) -> str | None:
    states = [_state_bytes(tokenizer._backend.model) for tokenizer in (target, draft)]
    added = [{i: t.content for i, t in tokenizer._added_tokens.items()} for tokenizer in (target, draft)]
    if states[0] == states[1] and added[0] == added[1]:
        return None  # the usual case, in a third of the time
    difference = _first_difference(target._ids_to_tokens, draft._ids_to_tokens, "token")
    return difference or _merge_difference(*(json.loads(state).get("merges") for state in states))


def _merge_difference(here: list[Any] | None, there: list[Any] | None) -> str | None:
    if here == there:
        return None
    if here is None or there is None:
        return "only one of them merges tokens (BPE)"
    index = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
    if index is None:
        return f"{len(here)} merges in the target and {len(there)} in the draft"
    return f"merge {index} is {here[index]!r} in the target and {there[index]!r} in the draft"


def _splitting_difference(target: Tokenizer, draft: Tokenizer) -> str | None:
    here, there = target.encode(_PROBE), draft.encode(_PROBE)
    if here == there:
        return None
    index = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
    if index is None:
        return f"a test text has {len(here)} tokens in the target and {len(there)} in the draft"
    return (
        f"a test text is split differently, first at token {index}: "
        f"{target._ids_to_tokens[here[index]]!r} in the target and "
        f"{draft._ids_to_tokens[there[index]]!r} in the draft"
    )


def _eos_of(folder: Path, file: str) -> set[int]:
    """`eos_token_id` of a JSON file: a number, a list or nothing."""
    path = folder / file
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError) as error:
        raise ModelUnreadable(
            f"{path} cannot be read: {_first_line(error)}", remedy="Check the file, or pull the model again."
        ) from error
    eos = values.get("eos_token_id") if isinstance(values, dict) else None
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelUnreadable(f"{path} has eos_token_id {eos!r}", remedy="Pull the model again.")
    return set(ids)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _is_incomplete(tail: bytes) -> bool:
    """Whether bytes end inside a UTF-8 character that the next byte could go on with."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(tail)
    waiting, _ = decoder.getstate()
    return bool(waiting)


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _state_bytes(component: Any) -> bytes:
    return bytes(component.__getstate__())


def _state(component: Any) -> dict[str, Any]:
    """A part of a fast tokenizer as its JSON; empty where the part is absent."""
    return {} if component is None else dict(json.loads(_state_bytes(component)))


def _step_names(state: Mapping[str, Any]) -> Iterator[str]:
    if "type" in state:
        yield str(state["type"])
    for inner in state.get("decoders", ()):
        yield from _step_names(inner)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' advice (no framework found, odd settings) while it works for us.

    Its loggers print from the first import on, before their level can be set; hence the switch for all.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
