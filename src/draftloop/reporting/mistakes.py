"""The tokens that the draft finds hardest: what it proposed against what the target wrote instead.

Contract: counts rejected proposals in stored traces. Must not know tokenizers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.types import TokenKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from draftloop.storage.records import RequestRecord

_RECOVERED = tuple(TokenKind).index(TokenKind.RECOVERED)


@dataclass(frozen=True, slots=True)
class Mistake:
    """One proposal that was rejected in favour of one other token.

    Attributes:
        proposed_id: the draft's token.
        wanted_id: the target's.
        times: how often this very swap happened.
        proposed_rejected, proposed_tested: how often `proposed_id` was rejected, of how often it was tested.
        confidence: mean q of the proposal, when it was swapped for this token.
    """

    proposed_id: int
    wanted_id: int
    times: int
    proposed_rejected: int
    proposed_tested: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Mistakes:
    """The most frequent ones of some requests.

    Attributes:
        requests: that were looked at.
        tested: proposals that the target accepted or rejected.
        rejected: of those.
        rows: the most frequent swaps, most frequent first.
    """

    requests: int
    tested: int
    rejected: int
    rows: tuple[Mistake, ...]


def count_mistakes(records: Iterable[RequestRecord], *, most: int) -> Mistakes:
    """The `most` frequent swaps of `records`, which are read one by one."""
    swaps: Counter[tuple[int, int]] = Counter()
    confidence: defaultdict[tuple[int, int], float] = defaultdict(float)
    tested: Counter[int] = Counter()
    rejected: Counter[int] = Counter()
    requests = 0
    for record in records:
        requests += 1
        traces = record.traces
        was_tested = traces.draft_ids >= 0
        tested.update(traces.draft_ids[was_tested].tolist())
        wrong = np.flatnonzero(was_tested & (traces.kinds == _RECOVERED))
        for row in wrong.tolist():
            swap = int(traces.draft_ids[row]), int(record.answer_tokens[row])
            swaps[swap] += 1
            rejected[swap[0]] += 1
            confidence[swap] += float(traces.draft_probs[row])
    most_frequent = sorted(swaps.items(), key=lambda item: (-item[1], item[0]))[:most]
    rows = tuple(
        Mistake(
            *swap,
            times,
            proposed_rejected=rejected[swap[0]],
            proposed_tested=tested[swap[0]],
            confidence=confidence[swap] / times,
        )
        for swap, times in most_frequent
    )
    return Mistakes(requests, tested.total(), rejected.total(), rows)
