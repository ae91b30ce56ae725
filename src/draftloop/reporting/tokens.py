"""A token as it can be seen: its text with spaces and line ends made visible.

Contract: plain text that the page escapes. Must not know models' folders.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

_MARKS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
LONGEST_CHARACTERS = 40


class Decoder(Protocol):
    """What is needed of `models.tokenizer.Tokenizer`."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`."""
        ...

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at this token."""
        ...


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token to look at.

    Attributes:
        text: visible text, or words where it has none.
        plain: True where `text` is the token's own, False where it is about the token.
        id: its number.
    """

    text: str
    plain: bool
    id: int


class TokenNames:
    """Names tokens, by their text where a tokenizer is at hand and by their id where none is."""

    def __init__(self, tokenizer: Decoder | None) -> None:
        self._tokenizer = tokenizer
        self.readable = tokenizer is not None
        # Some decoders drop the space before the first token, so each one is decoded behind another.
        self._anchor = tokenizer.encode("a") if tokenizer is not None else []
        self._anchor_text = tokenizer.decode(self._anchor) if tokenizer is not None else ""

    def name(self, token_id: int) -> ShownToken:
        """How to show one token."""
        if self._tokenizer is None:
            return ShownToken(f"token {token_id}", False, token_id)
        if token_id in self._tokenizer.eos_token_ids:
            return ShownToken("end of answer", False, token_id)
        if not self._tokenizer.has_text(token_id):
            return ShownToken(f"special token ({token_id})", False, token_id)
        text = self._tokenizer.decode([*self._anchor, token_id]).removeprefix(self._anchor_text)
        if not text or "\ufffd" in text:
            return ShownToken(f"part of a character ({token_id})", False, token_id)
        return ShownToken(visible(text), True, token_id)


def visible(text: str) -> str:
    """`text` with a mark for each space, line end and character that cannot be seen; long ones are cut."""
    shown = "".join(_visible_character(character) for character in text[:LONGEST_CHARACTERS])
    return shown + ("…" if len(text) > LONGEST_CHARACTERS else "")


def _visible_character(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    # Controls, formats (bidi marks among them), surrogates, unassigned ones, and the other spaces.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"U+{ord(character):04X}"
    return character
