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

RUN_LENGTHS = (2, 1)
"""Places are looked up by the text's last two tokens and, where those stood nowhere, by its last one: the
newest places of a frequent token alone would hide an older one where more agrees."""
MIN_MATCH_TOKENS = RUN_LENGTHS[-1]
"""One token often recurs by chance, which its estimate tells, and a verified row costs little: on 16 answers
of four kinds, with costs of two CPU cores, matches from one, two and three tokens on gave 1.8, 1.6 and 1.5
times the target's own speed in the median."""
MAX_MATCH_TOKENS = 64
"""A match is not followed further back: nothing becomes more certain by it."""
MAX_PLACES = 16
"""So many of the newest places are looked at, in the text and in the answers each."""
DRAFT_TOKENS_PER_MATCH_TOKEN = 2
"""A draft is at most so many times as long as its match."""
BYTES_PER_TOKEN = 240
"""What a remembered token takes where no two recur together. Text takes less than half of it."""

_BREAK = -1
_KEY_BITS = 32
_LAST_MASK = (1 << _KEY_BITS * RUN_LENGTHS[0]) - 1
_LENGTH_BOUNDS = (2, 3, 4, 5, 7, 9, 13, 17, 25, 33)
"""Where the classes of match length begin that share an estimate; the first class is what lies below."""
_PRIOR_TOKENS = 4.0
_HALF_CERTAIN_TOKENS = 3.0
"""Before anything was seen, a match of n tokens is taken to be right with probability n / (n + 3)."""


class Source(StrEnum):
    """Where a match was found."""

    TEXT = "text"
    ANSWERS = "answers"


class _Runs:
    """Where each run of `length` tokens stood in a trail.

    For each run the position that followed it last, and for each position the one before it that followed the
    same run.
    """

    def __init__(self, length: int, max_tokens: int) -> None:
        self.length = length
        self._mask = (1 << _KEY_BITS * length) - 1
        self._max_tokens = max_tokens
        self._earlier = array("q", bytes(8 * max_tokens))
        self._newest: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def add(self, last: int, position: int) -> None:
        """The token at `position` follows the tokens of `last`, which end with the run."""
        run = last & self._mask
        self._earlier[position % self._max_tokens] = self._newest.get(run, -1)
        self._newest[run] = position

    def forget(self, run: int, position: int) -> None:
        """What `position` follows is held no more."""
        if self._newest.get(run) == position:
            del self._newest[run]

    def places(self, last: int, start: int) -> list[int]:
        """The positions that followed the run whose first token is held, newest first, at most MAX_PLACES."""
        found: list[int] = []
        position = self._newest.get(last & self._mask, -1)
        while position >= start + self.length and len(found) < MAX_PLACES:
            found.append(position)
            position = self._earlier[position % self._max_tokens]
        return found


class TokenTrail:
    """The newest `max_tokens` tokens of a sequence, and where its runs of RUN_LENGTHS stood in them.

    A position counts from the first token ever appended.

    Args:
        max_tokens: more push the oldest out. At most BYTES_PER_TOKEN each.

    Raises:
        ValueError: `max_tokens` does not exceed the longest run.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens <= RUN_LENGTHS[0]:
            raise ValueError(f"max_tokens is {max_tokens}; a trail needs more than {RUN_LENGTHS[0]}")
        self.max_tokens = max_tokens
        self.end = 0
        self._tokens = array("i", bytes(4 * max_tokens))
        self._runs = {length: _Runs(length, max_tokens) for length in RUN_LENGTHS}
        self._last = 0
        self._run_tokens = 0

    @property
    def start(self) -> int:
        """The oldest position that is still held."""
        return max(0, self.end - self.max_tokens)

    def run(self, length: int) -> int | None:
        """The last `length` tokens as one number; None where there are fewer behind a break."""
        return self._last & ((1 << _KEY_BITS * length) - 1) if self._run_tokens >= length else None

    def num_runs(self, length: int) -> int:
        """Different runs of `length` that are remembered; never more than `max_tokens`."""
        return len(self._runs[length])

    def __getitem__(self, position: int) -> int:
        """The token at a held position; -1 is a break."""
        return self._tokens[position % self.max_tokens]

    def append(self, token: int) -> None:
        """Add one token; amortized O(1)."""
        self._push(token)
        for length, runs in self._runs.items():
            if self._run_tokens >= length:
                runs.add(self._last, self.end - 1)
        self._last = ((self._last << _KEY_BITS) | token) & _LAST_MASK
        self._run_tokens += 1

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens one after another."""
        for token in tokens:
            self.append(int(token))

    def close(self) -> None:
        """What comes next belongs to another text: no match reaches over this."""
        self._push(_BREAK)
        self._run_tokens = 0

    def places(self, run: int, length: int) -> list[int]:
        """The positions that followed a run of `length`, newest first, at most MAX_PLACES."""
        return self._runs[length].places(run, self.start)

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
        """The token at `start` goes, and with it the runs that begin there."""
        run = 0
        for length in range(1, RUN_LENGTHS[0] + 1):
            token = self[start + length - 1]
            if token == _BREAK:
                return
            run = (run << _KEY_BITS) | token
            if length in self._runs:
                self._runs[length].forget(run, start + length)


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
        keeps = max_answer_tokens > RUN_LENGTHS[0]
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
        text = TokenTrail(max(max_tokens, RUN_LENGTHS[0] + 1))
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
        if max_tokens < 1:
            return None
        length, places, source = self._longest(text)
        trail = self.answers if source is Source.ANSWERS and self.answers is not None else text
        limit = min(max_tokens, DRAFT_TOKENS_PER_MATCH_TOKEN * length)
        tokens, shares = _continuation(trail, places, limit, repeats=trail is text)
        if not tokens:
            return None
        acceptance = tuple(
            min(1.0, share * self._ratios[source, _group(length + i)].value) for i, share in enumerate(shares)
        )
        return Match(tuple(tokens), acceptance, tuple(shares), length, source)

    def _longest(self, text: TokenTrail) -> tuple[int, list[int], Source]:
        """The most tokens that the text ends with and that stood before, where, and in what."""
        ending = text.ending()
        for run_length in RUN_LENGTHS:
            run = text.run(run_length)
            if run is None:
                continue
            length, places = _longest(text, ending, text.places(run, run_length))
            if self.answers is not None:
                others = self.answers.places(run, run_length)
                other_length, other_places = _longest(self.answers, ending, others)
                if other_length > length:
                    return other_length, other_places, Source.ANSWERS
            if places:
                return length, places, Source.TEXT
        return 0, [], Source.TEXT

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

    def read(self, prompt: Sequence[int], num_tokens: int) -> None:
        """Follow the prompt's first `num_tokens` while the models read it.

        A long prompt takes tens of milliseconds; left to the first guess they would be a round's.
        """
        self._trail.extend(prompt[self._trail.end : num_tokens])

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


def _longest(trail: TokenTrail, ending: list[int], candidates: list[int]) -> tuple[int, list[int]]:
    """The most tokens that stand before a place as they end the text, and the places where they do."""
    best, places = 0, list[int]()
    for place in candidates:
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
