"""Which stored requests a training run learns from, validates on and is judged on; and whether it is time.

Contract: reads the store, changes nothing. Must not know a backend.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.errors import RecordLost
from draftloop.learning.examples import example_of
from draftloop.learning.failures import split, threshold_of
from draftloop.learning.replayed import TimedRound

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from draftloop.backends.training import Example
    from draftloop.config import Config
    from draftloop.config.schema import TrainingSettings
    from draftloop.storage.records import PairKey, RequestSummary
    from draftloop.storage.store import Store

logger = logging.getLogger(__name__)

RECENT_ROUNDS = 50
"""Requests whose rounds tell what a round costs here."""
VALIDATION_REQUESTS, GATE_REQUESTS = 32, 128
"""The newest so many are replayed: more of them cost time and tell little more."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The requests of one pair, sorted by what they are good for (ids, oldest first).

    Attributes:
        failures: below the threshold and not trained on yet.
        replay: everything else that is not held out.
        validation: chooses the checkpoint and the deployed form; the newest.
        gate: decides about promotion; the newest.
        threshold: the acceptance rate that separates failures from replay.
        needed: `training.min_failure_cases`.
        new_failures: of the failures, those that the last finished run has not seen.
        domains: of every request, by id.
        timed_round: what a round of recent requests took, None where none with drafts was stored.
        too_long: requests that none of the above names, because their prompts leave no room for an answer
            in `training.max_sequence_length`.
    """

    failures: tuple[int, ...]
    replay: tuple[int, ...]
    validation: tuple[int, ...]
    gate: tuple[int, ...]
    threshold: float
    needed: int
    new_failures: int
    domains: dict[int, str]
    timed_round: TimedRound | None
    too_long: int = 0

    @property
    def ready(self) -> bool:
        """Enough failures for `train`."""
        return len(self.failures) >= self.needed

    @property
    def ready_again(self) -> bool:
        """Enough failures for training by itself: what a run has rejected once is not tried again alone."""
        return self.ready and self.new_failures >= self.needed


def select(store: Store, pair: PairKey, config: Config) -> Selection:
    """Sort what is stored of `pair`."""
    summaries = store.requests.list(pair)
    drafted = [one for one in summaries if one.drafted_tokens]
    threshold = threshold_of(config.speculative.acceptance_threshold, drafted)
    usable = [one for one in summaries if one.num_prompt_tokens < config.training.max_sequence_length]
    parts = split(usable, threshold)
    finished = [run for run in store.runs.list(pair) if run.result.get("last_request") is not None]
    last_seen = max((int(run.result["last_request"]) for run in finished), default=0)
    return Selection(
        failures=_ids(parts.failures),
        replay=_ids(parts.replay),
        validation=_ids(parts.validation[-VALIDATION_REQUESTS:]),
        gate=_ids(parts.gate[-GATE_REQUESTS:]),
        threshold=threshold,
        needed=config.training.min_failure_cases,
        new_failures=sum(one.id > last_seen for one in parts.failures),
        domains={one.id: one.domain for one in summaries},
        timed_round=_timed_round(drafted, config.speculative.num_draft_tokens),
        too_long=len(summaries) - len(usable),
    )


def replay_sample(selection: Selection, settings: TrainingSettings) -> tuple[int, ...]:
    """As much of the replay as a run reads, drawn from all of it, oldest first.

    A run of E epochs over F failures reads ratio / (1 - ratio) · E · F of it (`plan_batches`).
    """
    ratio = settings.replay_ratio
    wanted = math.ceil(ratio / (1 - ratio) * settings.num_epochs * len(selection.failures))
    if wanted >= len(selection.replay):
        return selection.replay
    random = np.random.Generator(np.random.PCG64(settings.seed))
    chosen = random.choice(len(selection.replay), wanted, replace=False)
    return tuple(selection.replay[one] for one in sorted(chosen.tolist()))


def load_examples(
    store: Store, ids: Iterable[int], *, max_sequence_tokens: int, eos_token_ids: Sequence[int]
) -> dict[int, Example]:
    """The requests as the draft learns from them, by id.

    Those that made room for others, are damaged, or leave no answer when cut are left out.

    Raises:
        StorageError: the store itself cannot be read.
    """
    examples = {}
    for one in sorted(set(ids)):
        try:
            (record,) = store.requests.load([one])
        except RecordLost as error:
            logger.debug("request %d is left out: %s", one, error)
            continue
        example = example_of(record, max_sequence_tokens=max_sequence_tokens, eos_token_ids=eos_token_ids)
        if example is not None:
            examples[one] = example
    return examples


def _ids(summaries: Iterable[RequestSummary]) -> tuple[int, ...]:
    return tuple(one.id for one in summaries)


def _timed_round(drafted: Sequence[RequestSummary], num_draft_tokens: int) -> TimedRound | None:
    """The mean round of the median request, of the newest ones with that cap.

    K may have varied from round to round, so its drafts are counted, not taken to be the cap. Rounds in which
    a suffix match proposed are no rounds of the draft's. Only the newest request's vocabulary counts: another
    one's drafts cost something else.
    """
    rounds = [
        TimedRound((one.decode_s - one.suffix_s) / count, one.drafted_tokens / count)
        for one in drafted
        if one.num_draft_tokens == num_draft_tokens
        and one.vocabulary == drafted[-1].vocabulary
        and (count := one.rounds - one.suffix_rounds)
    ]
    recent = sorted(rounds[-RECENT_ROUNDS:], key=lambda one: one.seconds)
    return recent[len(recent) // 2] if recent else None
