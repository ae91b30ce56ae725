"""What one answer adds to the logits: a bias, penalties for what it has said, a grammar.

Contract: a `Processor` (`types.py`) that follows the answer: it knows what was emitted, and is asked for the
rows behind guesses. Penalties count the answer's own tokens, guesses included; the prompt's count for
nothing. Must not know models, rounds or text.

Source of the penalties: the OpenAI API, logit - count * frequency_penalty - (count > 0) * presence_penalty.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from draftloop.errors import GrammarFailed, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from draftloop.models.grammar import Grammar

    Floats = NDArray[np.float32]

T = TypeVar("T")

MOST_BIAS = 100.0
"""The OpenAI API's bounds: a bias this high makes a token all but certain, or all but impossible."""
MOST_PENALTY = 2.0


@dataclass(frozen=True, slots=True)
class Steering:
    """What a request changes about the distribution of its answer.

    Attributes:
        logit_bias: added to these tokens' logits.
        presence_penalty: taken off what the answer has said.
        frequency_penalty: taken off once for each time that it said it.
        grammar: what the answer must look like; it decides alone when the answer may end.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: Grammar | None = None

    @property
    def steers(self) -> bool:
        """Whether it changes anything."""
        penalized = bool(self.presence_penalty or self.frequency_penalty)
        return penalized or self.grammar is not None or any(self.logit_bias.values())

    def check(self, vocab_size: int) -> None:
        """Refuse what cannot be meant.

        Raises:
            InputError: a token that is not there, or a number out of the OpenAI API's bounds.
        """
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"logit_bias names token {token}", remedy=f"Tokens go from 0 to {vocab_size - 1}."
                )
            _check_within("logit_bias", bias, MOST_BIAS)
        _check_within("presence_penalty", self.presence_penalty, MOST_PENALTY)
        _check_within("frequency_penalty", self.frequency_penalty, MOST_PENALTY)

    def processor(self, vocab_size: int) -> AnswerProcessor | None:
        """For one answer of a target of `vocab_size`; None where nothing is changed."""
        return AnswerProcessor(self, vocab_size) if self.steers else None


class AnswerProcessor:
    """Follows one answer.

    Args:
        steering: what is added.
        vocab_size: V, the target's.
    """

    def __init__(self, steering: Steering, vocab_size: int) -> None:
        self._steering = steering
        self._state = None if steering.grammar is None else steering.grammar.start()
        self._counts: Counter[int] = Counter()
        self._bias = np.zeros(vocab_size, np.float32)
        self._put(self._bias, dict.fromkeys(steering.logit_bias, 0))
        # The draft and then the target ask for the same rows of a round.
        self._rows: dict[tuple[int, ...], Floats | None] = {}
        self.failure: GrammarFailed | None = None
        """Why the answer cannot go on. Kept, not raised: others may share its round."""

    def bias(self, drafted: Sequence[int]) -> Floats | None:
        """See `Processor`."""
        place = tuple(drafted)
        if place not in self._rows:
            self._rows[place] = self._guarded(lambda: self._row(place), None)
        return self._rows[place]

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` may be emitted, one after another."""
        state = self._state
        return len(tokens) if state is None else self._guarded(lambda: state.num_allowed(tokens), 0)

    def advance(self, tokens: Sequence[int]) -> int:
        """The answer has grown; how many of `tokens` belong to it: the grammar may have ended before."""
        state = self._state
        kept = len(tokens) if state is None else self._guarded(lambda: state.advance(tokens), 0)
        self._rows.clear()
        self._counts.update(tokens[:kept])
        self._put(self._bias, {token: self._counts[token] for token in tokens[:kept]})
        return kept

    @property
    def ended(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._state is not None and self._state.ended

    def _guarded(self, work: Callable[[], T], otherwise: T) -> T:
        """What `work` gives; something harmless from its failure on."""
        if self.failure is None:
            try:
                return work()
            except GrammarFailed as error:
                self.failure = error
        return otherwise

    def _row(self, drafted: tuple[int, ...]) -> Floats | None:
        bias = self._bias
        if drafted:
            bias = bias.copy()
            self._put(bias, {token: self._counts[token] + n for token, n in Counter(drafted).items()})
        if self._state is None:
            return bias
        allowed = self._state.allowed(drafted)
        return None if allowed is None else np.where(allowed, bias, np.float32(-np.inf))

    def _put(self, bias: Floats, counts: Mapping[int, int]) -> None:
        """What tokens get that were said so often."""
        steering = self._steering
        for token, count in counts.items():
            if token < len(bias):
                penalty = count * steering.frequency_penalty + (count > 0) * steering.presence_penalty
                bias[token] = steering.logit_bias.get(token, 0.0) - penalty


def _check_within(name: str, value: float, bound: float) -> None:
    if not -bound <= value <= bound:
        raise InputError(f"{name} is {value}", remedy=f"Choose from {-bound:g} to {bound:g}.")
