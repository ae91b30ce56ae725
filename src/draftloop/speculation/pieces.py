"""How long a piece of a prompt is that is read between others' rounds, so that they hardly notice.

Contract: deterministic given the seconds that it is told. A piece takes no longer than the quickest of the
others' newest rounds, so that the time between two of their tokens at most doubles. Must not know models or
prompts.

A pass takes some time once and some for each token; both are told by two pieces of different lengths. Where
even a single token takes longer than a round, as where a pass takes the same time whatever it reads, the
bound cannot be kept; a piece may then take a little longer than a token, for else a prompt would be read for
ever.
"""

from __future__ import annotations

import math
from collections import deque

FIRST_TOKENS = 8
"""Before it is known what reading takes."""
NEWEST_ROUNDS = 8
AIM = 0.95
"""Of the time there is: reading grows slower with the context."""
SLACK = 1.2
"""Over a single token, where that takes longer than a round."""
MOST_GROWTH = 1.5
"""From one piece to the next."""
TELLING_CHANGE = 0.25
"""Lengths that are nearer to each other tell more of chance than of what a token takes."""


class PieceLengths:
    """Of all prompts that are read beside others.

    Args:
        most_tokens: of a piece.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._rounds_s: deque[float] = deque(maxlen=NEWEST_ROUNDS)
        self._newest: tuple[int, float] | None = None
        self._other: tuple[int, float] | None = None
        """The newest of a length that differs enough."""
        self._single_s = 0.0

    def round_took(self, seconds: float) -> None:
        """The others' newest round."""
        self._rounds_s.append(seconds)

    def piece_took(self, num_tokens: int, seconds: float) -> None:
        """A whole piece was read, whoever waited for it."""
        if self._newest is not None and _differ(self._newest[0], num_tokens):
            self._other = self._newest
        self._newest = num_tokens, seconds
        if num_tokens == 1 or seconds < self._single_s:
            self._single_s = seconds

    def next_tokens(self) -> int:
        """Of the piece to be read now."""
        if self._newest is None or not self._rounds_s:
            return FIRST_TOKENS
        tokens, seconds = self._newest
        spare_s = AIM * max(min(self._rounds_s), SLACK * self._single_s) - seconds
        wanted = min(tokens + spare_s / self._token_s(spare_s), math.ceil(tokens * MOST_GROWTH))
        return min(max(math.floor(wanted), 1), self._most_tokens)

    def _token_s(self, spare_s: float) -> float:
        """What a token more or less changes; unknown, the most for one more, the least for one less."""
        tokens, seconds = self._newest or (FIRST_TOKENS, 0.0)
        token_s = seconds / tokens * (1.0 if spare_s > 0 else 0.5)
        if self._other is not None and _differ(self._other[0], tokens):
            token_s = (seconds - self._other[1]) / (tokens - self._other[0])
        return max(token_s, 1e-9)


def _differ(one: int, other: int) -> bool:
    return abs(one - other) >= TELLING_CHANGE * max(one, other)
