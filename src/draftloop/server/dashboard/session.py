"""What was answered since the server began, kept in memory where nothing is stored.

Contract: bounded; figures only, no text. One thread adds while others read. Must not know HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from draftloop.storage.records import RequestSummary

if TYPE_CHECKING:
    from collections.abc import Callable

    from draftloop.answers import Completion

MAX_REQUESTS = 500
SOURCE = "serve"


class SessionHistory:
    """The newest answers' figures.

    Args:
        clock: Unix time.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._requests: deque[RequestSummary] = deque(maxlen=MAX_REQUESTS)
        self._lock = threading.Lock()
        self._count = 0

    def add(self, completion: Completion) -> None:
        """Keep one answer's figures."""
        tally = completion.tally
        with self._lock:
            self._count += 1
            self._requests.append(
                RequestSummary(
                    id=self._count,
                    created_s=self._clock(),
                    adapter=completion.adapter,
                    domain="",
                    source=SOURCE,
                    held_out=False,
                    trained_by=None,
                    num_prompt_tokens=completion.prompt_tokens,
                    num_answer_tokens=len(completion.token_ids),
                    num_draft_tokens=0,
                    temperature=0.0,
                    rounds=tally.rounds,
                    drafted_tokens=tally.drafted_tokens,
                    accepted_tokens=tally.accepted_tokens,
                    tested_tokens=tally.tested_tokens,
                    alpha_sum=tally.alpha_sum,
                    prompt_s=completion.prompt_s,
                    decode_s=completion.decode_s,
                    stored_bytes=0,
                    suffix_rounds=tally.suffix_rounds,
                    suffix_tokens=tally.suffix_tokens,
                    suffix_drafted_tokens=tally.suffix_drafted_tokens,
                    suffix_accepted_tokens=tally.suffix_accepted_tokens,
                    suffix_s=tally.suffix_s,
                )
            )

    def requests(self) -> list[RequestSummary]:
        """Oldest first."""
        with self._lock:
            return list(self._requests)

    @property
    def count(self) -> int:
        """Answers since the server began, forgotten ones included."""
        return self._count
