"""From the target's traces to the two forms in which the OpenAI API tells log-probabilities.

Contract: they are the target's own at temperature 1, whatever temperature, bias or grammar the answer was
drawn under. EOS, which has no text, is left out. Must not know requests or streams.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.server.openai.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.models.tokenizer import Tokenizer
    from draftloop.types import Trace

UNKNOWN_LOGPROB = -9999.0
"""What the API says of a token that is not among those whose probability is kept."""


@dataclass(frozen=True, slots=True)
class Position:
    """One emitted token, and the target's most likely ones there.

    Attributes:
        token_id: the one emitted.
        logprob: its own.
        top: id and log-probability of the most likely, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def positions(
    tokenizer: Tokenizer, token_ids: Sequence[int], traces: Sequence[Trace], num_top: int
) -> list[Position]:
    """The emitted tokens that have text.

    Args:
        tokenizer: of the pair.
        token_ids: emitted, at most as many as the traces have rows.
        traces: of the rounds that emitted them.
        num_top: how many of the most likely tokens are wanted.
    """
    rows = ((trace, row) for trace in traces for row in range(len(trace.top_ids)))
    return [
        _position(token_id, trace, row, num_top)
        for token_id, (trace, row) in zip(token_ids, rows, strict=False)
        if tokenizer.has_text(token_id)
    ]


def _position(token_id: int, trace: Trace, row: int, num_top: int) -> Position:
    ids, logprobs = trace.top_ids[row].tolist(), trace.top_logprobs[row].tolist()
    known = dict(zip(ids, logprobs, strict=True))
    top = tuple(zip(ids[:num_top], logprobs[:num_top], strict=True))
    return Position(token_id, known.get(token_id, UNKNOWN_LOGPROB), top)


def chat_logprobs(tokenizer: Tokenizer, told: Sequence[Position]) -> ChatLogprobs:
    """As chat completions have them."""
    content = []
    for one in told:
        top = [_top(tokenizer, token_id, logprob) for token_id, logprob in one.top]
        own = _top(tokenizer, one.token_id, one.logprob)
        content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def _top(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    spelt = tokenizer.token_bytes(token_id)
    return TopLogprob(token=_shown(spelt), logprob=_finite(logprob), bytes=list(spelt))


class CompletionPositions:
    """The legacy form, whose offsets count on from part to part of one answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, told: Sequence[Position]) -> CompletionLogprobs:
        """The next part."""
        tokens, offsets, own, top = [], [], [], []
        for one in told:
            spelt = self._tokenizer.token_bytes(one.token_id)
            tokens.append(_shown(spelt))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(spelt))
            own.append(_finite(one.logprob))
            # The token itself is always among them, so there may be one more than was asked for.
            top.append(dict(self._named([*one.top, (one.token_id, one.logprob)])))
        return CompletionLogprobs(tokens=tokens, token_logprobs=own, top_logprobs=top, text_offset=offsets)

    def _named(self, top: Sequence[tuple[int, float]]) -> Iterator[tuple[str, float]]:
        for token_id, logprob in top:
            yield _shown(self._tokenizer.token_bytes(token_id)), _finite(logprob)


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, UNKNOWN_LOGPROB)


def _shown(spelt: bytes) -> str:
    """A token as text; where it is a part of a character, its bytes as the API writes them."""
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
