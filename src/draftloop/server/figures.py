"""What the worker counts: outcomes, tokens, recent rounds, times to tokens.

Contract: written by the models' thread and the event loop, read by anyone, under a lock of its own. A metric
is computed by `speculation.metrics`. Must not know HTTP, nor how a figure is shown.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from prometheus_client import Histogram

from draftloop.speculation.metrics import Tally, tokens_per_second

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from draftloop.answers import Completion
    from draftloop.speculation.round import Round

RECENT_ROUNDS = 256
"""Rounds that alpha, tau, K and the current speed are taken over."""


class Outcome(StrEnum):
    """How a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    REFUSED = "refused"
    """It cannot be answered as it is: a field is wrong or cannot act, or the prompt is too long."""
    FAILED = "failed"
    QUEUE_FULL = "queue_full"
    SHUTTING_DOWN = "shutting_down"


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums since the start, and what recent rounds say.

    Attributes:
        requests: by outcome; each outcome is there.
        refused: requests that came no further than the guards, by status.
        prompt_tokens, cached_tokens: of completed answers; cached ones were not read again.
        total: all rounds, of cancelled answers too.
        recent: the newest `RECENT_ROUNDS`.
        drafted_per_round: of those, how many rounds drafted 0, 1, … tokens by the model (K).
        all_drafted_per_round: the same of all rounds.
        tokens_per_s: of the newest rounds; None before the first.
        last_tokens_per_s: of the newest completed answer.
        mean_tokens_per_s: of all completed answers.
        mean_answer_s: seconds that a completed answer took the models.
    """

    requests: Mapping[Outcome, int]
    refused: Mapping[int, int]
    prompt_tokens: int
    cached_tokens: int
    total: Tally
    recent: Tally
    drafted_per_round: Mapping[int, int]
    all_drafted_per_round: Mapping[int, int]
    tokens_per_s: float | None
    last_tokens_per_s: float | None
    mean_tokens_per_s: float | None
    mean_answer_s: float | None


FIRST_TOKEN_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
BETWEEN_TOKENS_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How the worker fares, all at one moment.

    Attributes:
        ready: it takes requests.
        draining: it takes none any more.
        active, queued: requests being answered, and waiting.
        adapter: what the draft wears; None is the bare draft.
        kv_bytes: what the answers being made hold in both models' caches.
        prefix_cache_bytes: what is kept of past texts.
        counts: everything that is counted.
    """

    ready: bool
    draining: bool
    active: int
    queued: int
    adapter: str | None
    kv_bytes: int
    prefix_cache_bytes: int
    counts: Counts


class Figures:
    """Counters. `round_done`, `completed` and `ended` are called as things happen.

    Attributes:
        first_token_s: from a request's arrival to its first round's end.
        between_tokens_s: between two tokens; those of one round share its time evenly.
    """

    def __init__(self) -> None:
        self.first_token_s = Histogram(
            "draftloop_time_to_first_token_seconds",
            "From a request's arrival, its wait included, to its first tokens.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=None,
        )
        self.between_tokens_s = Histogram(
            "draftloop_time_between_tokens_seconds",
            "Between two tokens of an answer; those of one round share its time evenly.",
            buckets=BETWEEN_TOKENS_BUCKETS_S,
            registry=None,
        )
        self._lock = threading.Lock()
        self._requests: Counter[Outcome] = Counter()
        self._refused: Counter[int] = Counter()
        self._total = Tally()
        self._drafted: Counter[int] = Counter()
        self._recent: deque[Round] = deque(maxlen=RECENT_ROUNDS)
        self._prompt_tokens = self._cached_tokens = self._answers = self._answer_tokens = 0
        self._prompt_s = self._decode_s = 0.0
        self._last_tokens_per_s: float | None = None
        self._listener: Callable[[Completion], None] | None = None

    def tell(self, listener: Callable[[Completion], None]) -> None:
        """From now on `listener` is given each completed answer, on the models' thread."""
        self._listener = listener

    def round_done(self, outcome: Round, seconds: float, waited_s: float, *, first: bool) -> None:
        """One round of any answer.

        Args:
            outcome: the round.
            seconds: what it took; of a round that answers shared, this one's share.
            waited_s: since the request's arrival where it is its first, else since the one before.
            first: whether it is.
        """
        if first:
            self.first_token_s.observe(waited_s)
        else:
            for _ in outcome.tokens:
                self.between_tokens_s.observe(waited_s / len(outcome.tokens))
        with self._lock:
            self._total.add(outcome)
            self._drafted[outcome.drafted_tokens] += 1
            self._recent.append(replace(outcome, trace=None, seconds=seconds))

    def completed(self, completion: Completion) -> None:
        """One answer came to its end."""
        with self._lock:
            self._requests[Outcome(completion.finish_reason.value)] += 1
            self._prompt_tokens += completion.prompt_tokens
            self._cached_tokens += completion.cached_tokens
            self._answers += 1
            self._answer_tokens += len(completion.token_ids)
            self._prompt_s += completion.prompt_s
            self._decode_s += completion.decode_s
            self._last_tokens_per_s = completion.tokens_per_s
        if self._listener is not None:
            self._listener(completion)

    def ended(self, outcome: Outcome) -> None:
        """One request ended otherwise."""
        with self._lock:
            self._requests[outcome] += 1

    def refused(self, status: int) -> None:
        """A guard refused one before anybody knew what it asks."""
        with self._lock:
            self._refused[status] += 1

    def counts(self) -> Counts:
        """All of it, now."""
        with self._lock:
            recent, rounds = Tally(), list(self._recent)
            for one in rounds:
                recent.add(one)
            seconds = sum(one.seconds or 0.0 for one in rounds)
            answer_s = self._prompt_s + self._decode_s
            return Counts(
                requests={outcome: self._requests[outcome] for outcome in Outcome},
                refused=dict(self._refused),
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                total=replace(self._total),
                recent=recent,
                drafted_per_round=dict(sorted(Counter(one.drafted_tokens for one in rounds).items())),
                all_drafted_per_round=dict(sorted(self._drafted.items())),
                tokens_per_s=tokens_per_second(recent.completion_tokens, seconds),
                last_tokens_per_s=self._last_tokens_per_s,
                mean_tokens_per_s=tokens_per_second(self._answer_tokens, self._decode_s),
                mean_answer_s=answer_s / self._answers if self._answers else None,
            )
