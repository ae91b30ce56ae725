"""Answered requests -> the store.

Contract: `Recorder.record` keeps one answer whole or not at all; a store that fails is told of and never
stops the answering. Must not know how answers are made or shown.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.errors import StorageError
from draftloop.learning.watch import revert_if_falling
from draftloop.speculation.metrics import Tally
from draftloop.storage.records import RequestRecord, TraceRows
from draftloop.types import TokenKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.speculation.round import Round
    from draftloop.speculation.stream import DecodeSettings
    from draftloop.storage.records import PairKey
    from draftloop.storage.store import Store
    from draftloop.types import Trace

logger = logging.getLogger(__name__)

CANCELLED = "cancelled"
"""The finish reason that is stored where the reader went away."""

_KINDS = {kind: index for index, kind in enumerate(TokenKind)}


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a request came from.

    Attributes:
        domain: what it is about (`domain_of`).
        source: the command that made it.
        key: names a prompt of `collect`, so that it is not collected twice.
        conversation: turns of one conversation share it; None for a request that stands alone.
    """

    domain: str
    source: str
    key: str | None = None
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer, whole or broken off.

    Attributes:
        provenance: where the request came from.
        prompt_tokens: chat template applied.
        settings: how it was decoded.
        rounds: at least one.
        finish_reason: as stored.
        adapter: the draft's.
        prompt_s, decode_s: seconds spent on the prompt and on the rounds.
    """

    provenance: Provenance
    prompt_tokens: Sequence[int]
    settings: DecodeSettings
    rounds: Sequence[Round]
    finish_reason: str
    adapter: str | None
    prompt_s: float
    decode_s: float


def domain_of(system: str, tag: str | None = None) -> str:
    """A request's domain: its tag, else the hash of its system message."""
    if tag:
        return tag
    return f"system {digest(system)[:8]}" if system else "no system message"


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class Recorder:
    """Writes the answers of one pair.

    Args:
        store: where to.
        pair: who answers.
        revert_after_requests: the active adapter is looked at each time it has answered so many.
        vocabulary: names what the draft's head is cut to; None where it is whole.
    """

    def __init__(
        self, store: Store, pair: PairKey, revert_after_requests: int, vocabulary: str | None = None
    ) -> None:
        self._store = store
        self._vocabulary = vocabulary
        self._pair = pair
        self._revert_after_requests = revert_after_requests

    def record(self, answered: Answered) -> int | None:
        """Store one answer; returns its id, or None where the store failed, which is said."""
        try:
            identity = self._store.requests.add(self._record_of(answered))
            if answered.adapter is not None:
                reverted = revert_if_falling(
                    self._store, self._pair, after_requests=self._revert_after_requests
                )
                if reverted is not None:
                    logger.info(reverted)
            return identity
        except StorageError as error:
            logger.warning("this answer was not stored: %s", error)
            return None

    def _record_of(self, answered: Answered) -> RequestRecord:
        provenance, settings, rounds = answered.provenance, answered.settings, answered.rounds
        tally = Tally()
        for outcome in rounds:
            tally.add(outcome)
        prompt = np.asarray(answered.prompt_tokens, np.int32)
        return RequestRecord(
            created_s=time.time(),
            pair=self._pair,
            adapter=answered.adapter,
            domain=provenance.domain,
            source=provenance.source,
            # A prompt whose answer was broken off is not collected yet.
            key=None if answered.finish_reason == CANCELLED else provenance.key,
            split_key=provenance.conversation or hashlib.sha256(prompt.tobytes()).hexdigest(),
            prompt_tokens=prompt,
            answer_tokens=np.array([token for outcome in rounds for token in outcome.tokens], np.int32),
            sampling=settings.sampling,
            min_tokens=settings.min_tokens,
            num_draft_tokens=settings.num_draft_tokens,
            seed=settings.seed,
            finish_reason=answered.finish_reason,
            rounds=tally.rounds,
            drafted_tokens=tally.drafted_tokens,
            accepted_tokens=tally.accepted_tokens,
            tested_tokens=tally.tested_tokens,
            alpha_sum=tally.alpha_sum,
            prompt_s=answered.prompt_s,
            decode_s=answered.decode_s,
            traces=trace_rows(rounds),
            suffix_rounds=tally.suffix_rounds,
            suffix_tokens=tally.suffix_tokens,
            suffix_drafted_tokens=tally.suffix_drafted_tokens,
            suffix_accepted_tokens=tally.suffix_accepted_tokens,
            suffix_s=tally.suffix_s,
            vocabulary=self._vocabulary,
        )


def trace_rows(rounds: Sequence[Round]) -> TraceRows:
    """The traces of all rounds, one row for each emitted token.

    Raises:
        ValueError: a round was decoded without its trace.
    """
    traces: list[Trace] = [outcome.trace for outcome in rounds if outcome.trace is not None]
    if len(traces) < len(rounds):
        raise ValueError(f"{len(rounds) - len(traces)} of {len(rounds)} rounds have no trace")
    lengths = [len(outcome.tokens) for outcome in rounds]
    return TraceRows(
        round_index=np.repeat(np.arange(len(rounds), dtype=np.int32), lengths),
        kinds=np.array([_KINDS[kind] for outcome in rounds for kind in outcome.kinds], np.uint8),
        draft_ids=np.concatenate([trace.draft_ids for trace in traces]),
        draft_probs=np.concatenate([trace.draft_probs for trace in traces]),
        top_ids=np.concatenate([trace.top_ids for trace in traces]),
        top_logprobs=np.concatenate([trace.top_logprobs for trace in traces]),
        tail_mass=np.concatenate([trace.tail_mass for trace in traces]),
    )
