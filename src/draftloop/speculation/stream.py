"""One text in the making: its tokens, what the caches hold of them, and the rules it is decoded by.

Contract: between rounds the target's cache holds every token but the last, and the draft's cache a prefix
of that. Must not know how a round works, nor any text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import PrefillJob
from draftloop.errors import ContextFull
from draftloop.speculation.processors import Steering
from draftloop.speculation.schedule import FixedPace
from draftloop.speculation.shortage import restored
from draftloop.speculation.uniforms import Uniforms
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.base import Cache, Model
    from draftloop.errors import DraftloopError, OutOfMemory
    from draftloop.speculation.schedule import Pace
    from draftloop.speculation.suffix import SuffixText

    Tokens = Sequence[int] | NDArray[np.int32]

PREFILL_CHUNK_TOKENS = 256
"""A prompt is read in pieces of this size, so that progress shows and a cancelled request ends soon."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models. Without a draft the target decodes alone."""

    target: Model
    draft: Model | None


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How one answer is decoded.

    Attributes:
        sampling: applies to p and q alike.
        max_tokens: at most so many are emitted, EOS included.
        min_tokens: an answer has at least so many, EOS included; 1 means no minimum.
        eos_token_ids: any of them ends the answer.
        num_draft_tokens: the most tokens that the draft model proposes in a round; 0 asks the target alone.
        seed: fixes every random choice.
        trace: whether each round carries the target's top tokens.
        steering: what is added to the logits, for p and q alike.
    """

    sampling: Sampling
    max_tokens: int
    eos_token_ids: frozenset[int]
    num_draft_tokens: int
    seed: int
    min_tokens: int = 1
    trace: bool = False
    steering: Steering = field(default_factory=Steering)


class Conversation:
    """The caches of one conversation and the tokens that it consists of. Kept across turns."""

    def __init__(self, pair: Pair) -> None:
        self.tokens: list[int] = []
        self.target_cache: Cache = pair.target.new_cache()
        self.draft_cache: Cache | None = pair.draft.new_cache() if pair.draft else None
        self.adapter: str | None = None
        self.vocab_size = pair.target.architecture.vocab_size

    @property
    def max_tokens(self) -> int:
        """The longest text, prompt and answer together: the target's `max_kv_cache_tokens`."""
        return self.target_cache.max_tokens

    def forget_draft(self, adapter: str | None) -> None:
        """The draft wears another adapter now: what it cached was computed by the old one."""
        if self.draft_cache is not None:
            self.draft_cache.trim(self.draft_cache.position)
        self.adapter = adapter

    def settle(self, num_tokens: int) -> None:
        """Make the text `num_tokens` long and forget what the caches hold beyond it."""
        del self.tokens[num_tokens:]
        for cache in (self.target_cache, self.draft_cache):
            if cache is not None:
                cache.trim(max(0, cache.position - max(0, num_tokens - 1)))


class Stream:
    """One answer being decoded in a conversation.

    Args:
        conversation: its caches hold the prompt.
        settings: how it is decoded.
        pace: how many tokens each round drafts; None is `num_draft_tokens` in every round.
        suffix: proposes what followed the text's end before; None drafts from no earlier text.
    """

    def __init__(
        self,
        conversation: Conversation,
        settings: DecodeSettings,
        pace: Pace | None = None,
        suffix: SuffixText | None = None,
    ) -> None:
        self.pace = pace or FixedPace(settings.num_draft_tokens)
        self.suffix = suffix
        self.conversation = conversation
        self.settings = settings
        self.uniforms = Uniforms(settings.seed)
        self.processor = settings.steering.processor(conversation.vocab_size)
        self.emitted_tokens = 0
        self.shortage: OutOfMemory | None = None
        """There was no memory for its round, though nobody shared it."""

    @property
    def remaining_tokens(self) -> int:
        """How many tokens may still be emitted, by `max_tokens` and by the cache's cap."""
        room = self.conversation.max_tokens - len(self.conversation.tokens)
        return min(self.settings.max_tokens - self.emitted_tokens, room)

    @property
    def failure(self) -> DraftloopError | None:
        """Why the answer cannot go on; None while it can."""
        return self.shortage or (None if self.processor is None else self.processor.failure)

    @property
    def rules(self) -> Rules:
        """Warping, masks and what is added for the coming rows. A grammar decides alone about the end."""
        settings = self.settings
        held_back = 0 if settings.steering.grammar else settings.min_tokens - 1 - self.emitted_tokens
        return Rules(
            sampling=settings.sampling,
            masked_ids=tuple(sorted(settings.eos_token_ids)),
            masked_rows=max(0, held_back),
            processor=self.processor,
        )


def check_fits(prompt_tokens: int, max_tokens: int) -> None:
    """Refuse a prompt that is empty or leaves no room for an answer in `max_tokens` of cache.

    Raises:
        ContextFull: with both numbers.
    """
    if prompt_tokens < 1:
        raise ContextFull("the prompt has no tokens", remedy="Write a prompt.")
    if prompt_tokens >= max_tokens:
        raise ContextFull(
            f"the prompt has {prompt_tokens} tokens and max_kv_cache_tokens is {max_tokens}",
            remedy="Shorten the prompt or raise models.target.max_kv_cache_tokens.",
        )


class PromptReading:
    """Brings both caches to a prompt, piece by piece, reusing the beginning they already hold.

    The target reads all but the last token. The draft reads along as far as its own cap allows; where
    it cannot follow, the target goes on alone.

    Args:
        pair: the models.
        conversation: theirs.
        prompt: the whole text.
        wanted: told how many tokens the draft lacks; where it says no, the draft reads nothing now, and
            catches up when it is asked. None: the draft reads along.

    Raises:
        ContextFull: the prompt leaves no room for an answer.
    """

    def __init__(
        self,
        pair: Pair,
        conversation: Conversation,
        prompt: Sequence[int],
        wanted: Callable[[int], bool] | None = None,
    ) -> None:
        check_fits(len(prompt), conversation.max_tokens)
        shared = common_prefix(conversation.tokens, prompt)
        conversation.settle(min(shared + 1, len(prompt), len(conversation.tokens)))
        conversation.tokens = list(prompt)
        self._prompt, self._target_cache = prompt, conversation.target_cache
        self._models = [(pair.target, conversation.target_cache)]
        draft_cache = conversation.draft_cache
        reads = draft_cache is not None and (wanted is None or wanted(len(prompt) - draft_cache.position))
        if pair.draft is not None and draft_cache is not None and reads:
            self._models.append((pair.draft, draft_cache))
        self._next, self._end = min(cache.position for _, cache in self._models), len(prompt) - 1

    @property
    def done_tokens(self) -> int:
        """How many of the prompt's tokens the target's cache holds."""
        return self._target_cache.position

    @property
    def left_tokens(self) -> int:
        """How many are still to be read, by one model at least."""
        return max(0, self._end - self._next)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to read."""
        return not self.left_tokens

    def read(self, num_tokens: int = PREFILL_CHUNK_TOKENS) -> None:
        """Read the next piece.

        Raises:
            OutOfMemory: the caches hold what they held before; the same piece can be read again.
        """
        stop = min(self._next + num_tokens, self._end)
        with restored([cache for _, cache in self._models]):
            for model, cache in self._models:
                piece = self._prompt[cache.position : min(stop, cache.max_tokens)]
                if piece:
                    model.prefill([PrefillJob(cache, piece)])
        self._next = stop


def read_prompt(
    pair: Pair, conversation: Conversation, prompt: Sequence[int], wanted: Callable[[int], bool] | None = None
) -> Iterator[int]:
    """Read a whole prompt; see `PromptReading`.

    Yields:
        How many of the prompt's tokens the target's cache holds, at first and after each piece.
    """
    reading = PromptReading(pair, conversation, prompt, wanted)
    yield reading.done_tokens
    while not reading.finished:
        reading.read()
        yield reading.done_tokens


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(np.asarray(a[:length], np.int32) != np.asarray(b[:length], np.int32))
    return int(differing[0]) if len(differing) else length
