"""How long a piece of a prompt is that is read between others' rounds, so that they hardly notice.

Contract: deterministic given the seconds that it is told. A piece takes no longer than the quickest of the
others' newest rounds, so that the time between two of their tokens at most doubles. Must not know models or
prompts.

A pass takes some time once and some for each token; both are told by two pieces of lengths far apart, for
between near ones chance is larger. Where a pass takes about the time of a round whatever it reads, the bound
leaves room for a token or none: a piece may then take a fifth longer than a single token, for else a prompt
would be read for ever.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

FIRST_TOKENS = 8
"""Before it is known what reading takes."""
NEWEST_ROUNDS = 8
NEWEST_PIECES = 64
"""What a piece took before these says nothing of now."""
AIM = 0.95
"""Of the time there is: reading grows slower with the context."""
SLACK, FEW_TOKENS, MANY_MORE = 1.2, 8, 4
"""Over a single token's pass, where the bound has room for few and that for so many times as many."""
MOST_GROWTH = 1.5
"""From one piece to the next."""
FAR = 2
"""Times: lengths that are nearer to each other tell more of chance than of what a token takes."""
MOST_RISE = 1.1
"""Over what a piece of such a length took before: a stall says little, a growing context is soon believed."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """So many tokens took so long; the `number`th of all pieces."""

    tokens: int
    seconds: float
    number: int


class PieceLengths:
    """Of all prompts that are read beside others.

    Args:
        most_tokens: of a piece.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._rounds_s: deque[float] = deque(maxlen=NEWEST_ROUNDS)
        self._known: dict[int, _Piece] = {}
        """The newest of each power of two."""
        self._newest: _Piece | None = None

    def round_took(self, seconds: float) -> None:
        """The others' newest round."""
        self._rounds_s.append(seconds)

    def piece_took(self, num_tokens: int, seconds: float) -> None:
        """A whole piece was read, whoever waited for it."""
        number = 0 if self._newest is None else self._newest.number + 1
        self._known = {
            power: one for power, one in self._known.items() if number - one.number < NEWEST_PIECES
        }
        before = self._known.get(num_tokens.bit_length())
        if before is not None:
            seconds = min(seconds, MOST_RISE * before.seconds)
        self._newest = self._known[num_tokens.bit_length()] = _Piece(num_tokens, seconds, number)

    def next_tokens(self) -> int:
        """Of the piece to be read now."""
        if self._newest is None or not self._rounds_s:
            return FIRST_TOKENS
        newest, single = self._newest, self._known.get(1)
        if FAR * max(one.tokens for one in self._known.values()) <= FIRST_TOKENS:
            # Nothing tells any more what a token takes.
            return FIRST_TOKENS
        fitting = self._fitting(newest, AIM * min(self._rounds_s))
        if fitting < FEW_TOKENS and single is not None:
            more = self._fitting(newest, SLACK * single.seconds)
            fitting = more if more >= MANY_MORE * max(fitting, 1) else fitting
        return max(1, min(math.floor(fitting), math.ceil(newest.tokens * MOST_GROWTH), self._most_tokens))

    def _fitting(self, newest: _Piece, room_s: float) -> float:
        spare_s = room_s - newest.seconds
        wanted = newest.tokens + spare_s / self._token_s(newest, growing=spare_s > 0)
        too_long = [one.tokens - 1 for one in self._known.values() if one.seconds > room_s]
        return min([wanted, *too_long])

    def _token_s(self, newest: _Piece, *, growing: bool) -> float:
        """What a token more or less changes; unknown, the most for one more. One less may change less."""
        each_s = newest.seconds / newest.tokens

        def times(one: _Piece) -> float:
            return max(one.tokens, newest.tokens) / min(one.tokens, newest.tokens)

        other, token_s = max(self._known.values(), key=times), each_s
        if times(other) >= FAR:
            token_s = (newest.seconds - other.seconds) / (newest.tokens - other.tokens)
        return max(token_s, 0.0 if growing else each_s / 2, 1e-9)
