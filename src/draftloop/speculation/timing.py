"""One step of a model, to be timed: as rounds make it, on scratch caches.

Contract: seconds by a clock that is passed in; nobody may be answering. The only place where a proposal is
timed. Must not know what the seconds are for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.errors import OutOfMemory
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from draftloop.backends.base import Cache, Model

CONTEXT_TOKENS = 64
"""Steps are timed behind a short text: what sets one off against another hardly depends on it."""
OWN_TOKENS = 16
"""A text holds about so many tokens that a cut head lacks, and drafts from them too (`ProposeJob.text`)."""
GREEDY = Rules(Sampling())


def time_proposals(
    draft: Model,
    num_draft_tokens: int,
    times: int,
    *,
    rules: Rules = GREEDY,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each of `times` proposals of K tokens behind a short text, after one that does not count."""
    propose = proposal_step(draft, [filled_cache(draft, num_draft_tokens)], num_draft_tokens, rules)
    propose()
    seconds = []
    for _ in range(times):
        before_s = clock()
        propose()
        seconds.append(clock() - before_s)
    return seconds


def filled_cache(model: Model, room: int) -> Cache:
    """A scratch cache that holds a short text and has room for `room` more tokens."""
    cache = model.new_cache()
    context = max(1, min(CONTEXT_TOKENS, cache.max_tokens - room))
    model.prefill([PrefillJob(cache, [1] * context)])
    return cache


def caches_beside(model: Model, cache: Cache, count: int) -> list[Cache]:
    """It and copies of it, `count` in all; none where there is no room for so many."""
    try:
        # Reading the same text again for each would take longer than all that is timed.
        text = cache.copy(cache.position)
        others = [model.new_cache() for _ in range(count - 1)]
        for other in others:
            other.paste(text, cache.position)
    except OutOfMemory:
        return []
    return [cache, *others]


def proposal_step(
    draft: Model, caches: Sequence[Cache], num_draft_tokens: int, rules: Rules, unread_tokens: int = 1
) -> Callable[[], Proposal]:
    """Reads and drafts for a sequence in each cache, waits for the device, and leaves them as they were."""
    uniforms = np.zeros(num_draft_tokens, np.float32)
    text = _own_tokens(draft)
    jobs = [
        ProposeJob(cache, [1] * unread_tokens, num_draft_tokens, rules, uniforms, text) for cache in caches
    ]

    def step() -> Proposal:
        positions = [cache.position for cache in caches]
        *_, proposal = draft.propose(jobs)
        # A device works ahead of the host; reading a token waits for it.
        int(proposal.tokens[-1])
        for cache, position in zip(caches, positions, strict=True):
            cache.trim(cache.position - position)
        return proposal

    return step


def _own_tokens(draft: Model) -> list[int]:
    """Some tokens that were cut off, spread over the vocabulary; none where the head is whole."""
    cut = draft.vocabulary
    if cut is None:
        return []
    size = draft.architecture.vocab_size
    missing = cut.missing(np.arange(size, dtype=np.int32), size)
    own: list[int] = missing[:: max(1, len(missing) // OWN_TOKENS)][:OWN_TOKENS].tolist()
    return own


def verification_step(
    target: Model,
    caches: Sequence[Cache],
    num_draft_tokens: int,
    rules: Rules,
    *,
    drafted: Proposal,
    trace: bool,
) -> Callable[[], None]:
    """Verifies K tokens, the first of `drafted` where it has as many, for a sequence in each cache."""
    k = num_draft_tokens
    proposal = Proposal(tokens=(1,) * k, q=None, num_tokens=k) if k else NO_PROPOSAL
    if 0 < k <= drafted.num_tokens:
        q = None if drafted.q is None else drafted.q[:k]
        proposal = Proposal(tokens=drafted.tokens[:k], q=q, num_tokens=k)
    jobs = [
        VerifyJob(
            cache=cache,
            last=1,
            proposal=proposal,
            rules=rules,
            accept_uniforms=np.zeros(k, np.float32),
            extra_uniforms=np.zeros(k + 1, np.float32),
            trace=trace,
        )
        for cache in caches
    ]

    def step() -> None:
        positions = [cache.position for cache in caches]
        target.verify(jobs)
        for cache, position in zip(caches, positions, strict=True):
            cache.trim(cache.position - position)

    return step
