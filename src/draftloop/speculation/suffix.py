"""Drafts that cost nothing: where the end of the text stood before, what followed it may follow again.

Contract: token ids go in, a guess with its chances comes out; a call takes tens of microseconds, memory
is bounded, and the same calls in the same order give the same guesses. Must not know models, rounds or the
store.

Sources: Saxena 2023, prompt lookup decoding; Oliaro et al. 2024, SuffixDecoding (past answers, votes of
several places, a draft's length bounded by that of the match); Deutsch 1996, RFC 1951 section 4 (the chain of
places that share a hash; ours is exact).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from draftloop.speculation.smoothing import SmoothedRatio

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MIN_MATCH_TOKENS = 2
"""Two tokens often recur by chance, which their estimate tells; on 36 stored answers of one kind the index
found tau 1.42 from two on, 1.29 from three on, 1.17 from four on (`benchmarks/suffix.py`)."""
MAX_MATCH_TOKENS = 64
"""A match is not followed further back: nothing becomes more certain by it."""
MAX_PLACES = 16
"""So many of the newest places are looked at, in the text and in the answers each."""
DRAFT_TOKENS_PER_MATCH_TOKEN = 2
"""A draft is at most so many times as long as its match."""
BYTES_PER_TOKEN = 140
"""What a remembered token takes where no run recurs: less where some do."""

_BREAK = -1
_KEY_BITS = 32
_LENGTH_BOUNDS = (3, 4, 5, 7, 9, 13, 17, 25, 33)
"""Where the classes of match length begin that share an estimate; the first class is what lies below."""
_PRIOR_TOKENS = 4.0
_HALF_CERTAIN_TOKENS = 3.0
"""Before anything was seen, a match of n tokens is taken to be right with probability n / (n + 3)."""


class Source(StrEnum):
    """Where a match was found."""

    TEXT = "text"
    ANSWERS = "answers"


class TokenTrail:
    """The newest `max_tokens` tokens of a sequence, and where each run of MIN_MATCH_TOKENS stood in them.

    A position counts from the first token ever appended. For each run a dictionary holds the position that
    followed it last, and each position the one before it that followed the same run.

    Args:
        max_tokens: more push the oldest out. At most BYTES_PER_TOKEN each.

    Raises:
        ValueError: `max_tokens` does not exceed MIN_MATCH_TOKENS.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens <= MIN_MATCH_TOKENS:
            raise ValueError(f"max_tokens is {max_tokens}; a trail needs more than {MIN_MATCH_TOKENS}")
        self.max_tokens = max_tokens
        self.end = 0
        self._tokens = array("i", bytes(4 * max_tokens))
        self._earlier = array("q", bytes(8 * max_tokens))
        self._newest: dict[int, int] = {}
        self._run = 0
        self._run_tokens = 0

    @property
    def start(self) -> int:
        """The oldest position that is still held."""
        return max(0, self.end - self.max_tokens)

    @property
    def run(self) -> int | None:
        """The last MIN_MATCH_TOKENS tokens as one number; None where there are fewer behind a break."""
        return self._run if self._run_tokens >= MIN_MATCH_TOKENS else None

    @property
    def num_runs(self) -> int:
        """Different runs that are remembered; never more than `max_tokens`."""
        return len(self._newest)

    def __getitem__(self, position: int) -> int:
        """The token at a held position; -1 is a break."""
        return self._tokens[position % self.max_tokens]

    def append(self, token: int) -> None:
        """Add one token; amortized O(1)."""
        run = self.run
        self._push(token)
        if run is not None:
            position = self.end - 1
            self._earlier[position % self.max_tokens] = self._newest.get(run, -1)
            self._newest[run] = position
        self._run = ((self._run << _KEY_BITS) | token) & ((1 << _KEY_BITS * MIN_MATCH_TOKENS) - 1)
        self._run_tokens += 1

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens one after another."""
        for token in tokens:
            self.append(int(token))

    def close(self) -> None:
        """What comes next belongs to another text: no match reaches over this."""
        self._push(_BREAK)
        self._run_tokens = 0

    def places(self, run: int) -> list[int]:
        """The positions that followed `run`, newest first, at most MAX_PLACES."""
        found: list[int] = []
        first = self.start + MIN_MATCH_TOKENS
        position = self._newest.get(run, -1)
        while position >= first and len(found) < MAX_PLACES:
            found.append(position)
            position = self._earlier[position % self.max_tokens]
        return found

    def ending(self) -> list[int]:
        """The last MAX_MATCH_TOKENS tokens at most, the last one first."""
        first = max(self.start, self.end - MAX_MATCH_TOKENS)
        return [self[position] for position in range(self.end - 1, first - 1, -1)]

    def agreement(self, position: int, ending: list[int]) -> int:
        """How many tokens before `position` are those of `ending`, in its order."""
        tokens, size, last = self._tokens, self.max_tokens, position - 1
        length, limit = 0, min(len(ending), position - self.start)
        while length < limit and tokens[(last - length) % size] == ending[length] != _BREAK:
            length += 1
        return length

    def _push(self, token: int) -> None:
        if self.end >= self.max_tokens:
            self._forget(self.start)
        self._tokens[self.end % self.max_tokens] = token
        self.end += 1

    def _forget(self, start: int) -> None:
        """The token at `start` goes, and with it the run that begins there."""
        run = 0
        for position in range(start, start + MIN_MATCH_TOKENS):
            token = self[position]
            if token == _BREAK:
                return
            run = (run << _KEY_BITS) | token
        if self._newest.get(run) == start + MIN_MATCH_TOKENS:
            del self._newest[run]


@dataclass(frozen=True, slots=True)
class Match:
    """A guess at the next tokens.

    Attributes:
        tokens: at least one.
        acceptance: for each, the estimated probability that the target keeps it if it kept those before it.
        shares: for each, the share of the places that went on with it.
        match_tokens: how many of the text's last tokens stood there before.
        source: where.
    """

    tokens: tuple[int, ...]
    acceptance: tuple[float, ...]
    shares: tuple[float, ...]
    match_tokens: int
    source: Source


class SuffixIndex:
    """What the target has written before, and how far it can be trusted to write it again.

    One text is followed by a trail of its own (`open_text`), which grows with the text; answers that are
    finished go into one trail for all (`add_answer`), the oldest tokens out first.

    Args:
        max_answer_tokens: how many tokens of answers are kept; 0 keeps none.
    """

    def __init__(self, max_answer_tokens: int) -> None:
        self.max_answer_tokens = max_answer_tokens
        keeps = max_answer_tokens > MIN_MATCH_TOKENS
        self.answers = TokenTrail(max_answer_tokens) if keeps else None
        self._ratios = {
            (source, group): SmoothedRatio(_prior(group), _PRIOR_TOKENS)
            for source in Source
            for group in range(len(_LENGTH_BOUNDS) + 1)
        }

    def add_answer(self, tokens: Iterable[int]) -> None:
        """Remember a finished answer."""
        if self.answers is not None:
            self.answers.extend(tokens)
            self.answers.close()

    def open_text(self, tokens: Iterable[int], max_tokens: int) -> TokenTrail:
        """A trail of a text that begins with `tokens`; append what is emitted.

        Args:
            tokens: the prompt.
            max_tokens: the text's longest length.
        """
        text = TokenTrail(max(max_tokens, MIN_MATCH_TOKENS + 1))
        text.extend(tokens)
        return text

    def match(self, text: TokenTrail, max_tokens: int) -> Match | None:
        """What followed the longest suffix of `text` that stood before, in it or in an answer.

        Of the MAX_PLACES newest places in each of both, those count where most tokens agree; the text's
        own go before the answers' at the same length. At each position the most frequent token is taken,
        the newest of several, and the places that went on otherwise drop out.

        Args:
            text: the prompt and what was emitted.
            max_tokens: of the draft; never more than DRAFT_TOKENS_PER_MATCH_TOKEN times the match.

        Returns:
            None where fewer than MIN_MATCH_TOKENS tokens are found again.
        """
        run = text.run
        if run is None or max_tokens < 1:
            return None
        ending = text.ending()
        length, places = _longest(text, ending, run)
        trail, source = text, Source.TEXT
        if self.answers is not None:
            other_length, others = _longest(self.answers, ending, run)
            if other_length > length:
                length, places, trail, source = other_length, others, self.answers, Source.ANSWERS
        limit = min(max_tokens, DRAFT_TOKENS_PER_MATCH_TOKEN * length)
        tokens, shares = _continuation(trail, places, limit, repeats=trail is text)
        if not tokens:
            return None
        acceptance = tuple(
            min(1.0, share * self._ratios[source, _group(length + i)].value) for i, share in enumerate(shares)
        )
        return Match(tuple(tokens), acceptance, tuple(shares), length, source)

    def observe(self, match: Match, drafted_tokens: int, accepted_tokens: int) -> None:
        """Learn from a round that proposed the first `drafted_tokens` of a match's tokens.

        Nothing is learnt from what stands behind the first rejected one.
        """
        for i in range(min(accepted_tokens + 1, drafted_tokens)):
            ratio = self._ratios[match.source, _group(match.match_tokens + i)]
            ratio.add(1.0 if i < accepted_tokens else 0.0, match.shares[i])


class SuffixText:
    """One text in the making, followed by the index.

    Each guess is compared with what was then written in its place, whoever drafted it: the index learns how
    far to trust itself also where it was not asked.

    Args:
        index: where the text's end is looked for, beside the text itself.
        max_text_tokens: the text's longest length.
        max_draft_tokens: of one guess.
    """

    def __init__(self, index: SuffixIndex, max_text_tokens: int, max_draft_tokens: int) -> None:
        self.max_draft_tokens = max_draft_tokens
        self._index = index
        self._trail = index.open_text((), max_text_tokens)
        self._guess: Match | None = None

    def guess(self, tokens: Sequence[int], max_tokens: int) -> Match | None:
        """What may come next.

        Args:
            tokens: the whole text; it has only grown since the last call.
            max_tokens: of the guess.
        """
        written = tokens[self._trail.end :]
        if self._guess is not None:
            pairs = list(zip(self._guess.tokens, written, strict=False))
            right = next((i for i, (guessed, token) in enumerate(pairs) if guessed != token), len(pairs))
            self._index.observe(self._guess, len(pairs), right)
        self._trail.extend(written)
        self._guess = self._index.match(self._trail, min(max_tokens, self.max_draft_tokens))
        return self._guess

    def finish(self, answer: Iterable[int]) -> None:
        """The answer has ended: later texts may repeat it."""
        self._index.add_answer(answer)


def _longest(trail: TokenTrail, ending: list[int], run: int) -> tuple[int, list[int]]:
    """The most tokens that stand before a place as they end the text, and the places where they do."""
    best, places = 0, list[int]()
    for place in trail.places(run):
        length = trail.agreement(place, ending)
        if length > best:
            best, places = length, []
        if length == best:
            places.append(place)
    return best, places


def _continuation(
    trail: TokenTrail, places: list[int], max_tokens: int, *, repeats: bool
) -> tuple[list[int], list[float]]:
    """What most places went on with, and the share of them at each position.

    With `repeats`, the trail is the text itself: a place near its end goes on with the draft, so that
    what repeats with a short period is drafted at full length.
    """
    tokens: list[int] = []
    shares: list[float] = []
    while places and len(tokens) < max_tokens:
        votes: dict[int, list[int]] = {}
        for place in places:
            ahead = place + len(tokens)
            token = _BREAK
            if ahead < trail.end:
                token = trail[ahead]
            elif repeats:
                token = tokens[ahead - trail.end]
            if token != _BREAK:
                votes.setdefault(token, []).append(place)
        if not votes:
            break
        token = max(votes, key=lambda candidate: len(votes[candidate]))
        tokens.append(token)
        shares.append(len(votes[token]) / len(places))
        places = votes[token]
    return tokens, shares


def _group(match_tokens: int) -> int:
    return bisect_right(_LENGTH_BOUNDS, match_tokens)


def _prior(group: int) -> float:
    shortest = (MIN_MATCH_TOKENS, *_LENGTH_BOUNDS)[group]
    return shortest / (shortest + _HALF_CERTAIN_TOKENS)
