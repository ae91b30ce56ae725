"""A stored request as a conversation: the turns of its prompt, and its answer token by token with p and q.

Contract: pure functions of a record and a tokenizer; all text is plain and has to be escaped by whoever shows
it. Must not know the store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.models.text import TextStream
from draftloop.reporting.tokens import TokenNames
from draftloop.types import TokenKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.models.tokenizer import Tokenizer
    from draftloop.reporting.tokens import Decoder
    from draftloop.storage.records import RequestRecord

ROLES = frozenset({"system", "user", "assistant", "model", "tool"})
"""Words that chat templates write before a message."""

PREVIEW_CHARACTERS = 140
PREVIEW_TOKENS = 60
"""Tokens that surely hold so many characters, or enough of them."""

_KINDS = tuple(TokenKind)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a prompt; `role` is "" where the template does not tell it."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """One emitted token, and what both models thought at its place.

    Attributes:
        id: its number.
        text: what it adds to the answer; "" where a later token completes its character, or it has none.
        name: how to call it (`TokenNames`).
        kind: how it came to be.
        round: which round emitted it, from 0.
        p: the target's probability of it at temperature 1, nothing masked; None where it was not among the
            target's likeliest.
        p_below: then it is less than this; None where p is known.
        drafted: name of what the draft model proposed here; None where it proposed nothing.
        p_drafted: p of that, None as for p.
        q: the draft's probability of its proposal, warped as the request was sampled.
    """

    id: int
    text: str
    name: str
    kind: TokenKind
    round: int
    p: float | None
    p_below: float | None
    drafted: str | None
    p_drafted: float | None
    q: float | None


def turns_of(prompt_tokens: Sequence[int], tokenizer: Decoder) -> list[Turn]:
    """The messages of a prompt, as its special tokens part them; one without text is left out.

    A role is the word that stands alone in a segment (Llama 3) or in its first line (ChatML, Gemma).
    """
    turns: list[Turn] = []
    role = ""
    for segment in _segments(prompt_tokens, tokenizer):
        text = segment.strip()
        head, _, rest = text.partition("\n")
        if head.strip() in ROLES:
            role, text = head.strip(), rest.strip()
        if text:
            turns.append(Turn(role, text))
            role = ""
    return turns


def prompt_preview(prompt_tokens: Sequence[int], tokenizer: Decoder) -> str:
    """The beginning of the newest message, in one line."""
    turns = turns_of(prompt_tokens, tokenizer)
    return _one_line(turns[-1].text) if turns else ""


def answer_preview(answer_tokens: Sequence[int], tokenizer: Decoder) -> str:
    """The beginning of an answer, in one line."""
    return _one_line(tokenizer.decode(answer_tokens[:PREVIEW_TOKENS]))


def answer_tokens_of(record: RequestRecord, tokenizer: Tokenizer) -> list[AnswerToken]:
    """Every token of the answer, in order; their texts together are the answer's."""
    names, stream = TokenNames(tokenizer), TextStream(tokenizer)
    ids = record.answer_tokens.tolist()
    texts = [stream.push([token]) for token in ids]
    if texts:
        texts[-1] += stream.finish()
    return [
        _token(record, names, row, token, text)
        for row, (token, text) in enumerate(zip(ids, texts, strict=True))
    ]


def _token(record: RequestRecord, names: TokenNames, row: int, token: int, text: str) -> AnswerToken:
    traces = record.traces
    likeliest = dict(zip(traces.top_ids[row].tolist(), traces.top_logprobs[row].tolist(), strict=True))
    drafted = int(traces.draft_ids[row])
    p = _probability(likeliest, token)
    return AnswerToken(
        id=token,
        text=text,
        name=names.name(token).text,
        kind=_KINDS[int(traces.kinds[row])],
        round=int(traces.round_index[row]),
        p=p,
        p_below=math.exp(min(likeliest.values())) if p is None else None,
        drafted=names.name(drafted).text if drafted >= 0 else None,
        p_drafted=_probability(likeliest, drafted),
        q=float(traces.draft_probs[row]) if drafted >= 0 else None,
    )


def _probability(likeliest: dict[int, float], token: int) -> float | None:
    return math.exp(likeliest[token]) if token in likeliest else None


def _segments(token_ids: Sequence[int], tokenizer: Decoder) -> Iterator[str]:
    """The text between special tokens, where there is any."""
    run: list[int] = []
    for token in token_ids:
        if tokenizer.has_text(token):
            run.append(token)
        elif run:
            yield tokenizer.decode(run)
            run = []
    if run:
        yield tokenizer.decode(run)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= PREVIEW_CHARACTERS else f"{line[:PREVIEW_CHARACTERS].rstrip()}…"
