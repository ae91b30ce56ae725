"""What suffix matches alone would have brought to the answers in a store. No model is loaded.

Each stored answer is gone through in order, as if the target were to write it once more: what a match
proposes is kept as far as it is what was written. That is the acceptance of greedy answers; sampled ones may
keep more or fewer. The index knows the earlier answers only. How much of a match is proposed is chosen as in
serving, by what a verification costs. Prints tokens a round, times the speed of the target alone that this
would be, how often there was a match, how many of the proposed tokens were right, how many were expected to
be, and what finding one took.

    python benchmarks/suffix.py [--config FILE] [--set storage.directory=DIR] [--draft-tokens 3 7 15]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.config import load_config
from draftloop.loading import open_storage, pair_of
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.schedule import Schedule
from draftloop.speculation.suffix import SuffixIndex, SuffixText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.storage.records import RequestRecord


VERIFY_MS = [51, 53, 57, 61, 65, 71, 77, 81, 98, 105, 113, 120, 129, 138, 146, 155]
"""Of the pair of `configs/offline.yaml` on two cores of a Xeon with AVX-512."""


@dataclass
class Counts:
    """What happened."""

    rounds: int = 0
    tokens: int = 0
    matches: int = 0
    drafted: int = 0
    accepted: int = 0
    expected: float = 0.0
    seconds: float = 0.0
    call_us: list[float] = field(default_factory=list)


def go_through(
    records: Sequence[RequestRecord], costs: RoundCosts, max_draft_tokens: int, max_answer_tokens: int
) -> Counts:
    """Draft every answer from what was known before each of its tokens."""
    index, counts, pace = SuffixIndex(max_answer_tokens), Counts(), Schedule(costs).open(0)
    for record in records:
        written, answer = record.prompt_tokens.tolist(), record.answer_tokens.tolist()
        text = SuffixText(index, len(written) + len(answer), max_draft_tokens)
        done = 0
        while done < len(answer):
            started_s = time.perf_counter()
            match = text.guess(written, len(answer) - done - 1)
            counts.call_us.append((time.perf_counter() - started_s) * 1e6)
            k = kept = 0
            if match is not None:
                k = pace.choose_free(match.acceptance).num_draft_tokens
                pairs = zip(match.tokens[:k], answer[done:], strict=False)
                kept = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
                counts.matches += 1
                counts.drafted += k
                chance = 1.0
                for acceptance in match.acceptance[:k]:
                    chance *= acceptance
                    counts.expected += chance
            written += answer[done : done + kept + 1]
            done += kept + 1
            counts.rounds += 1
            counts.accepted += kept
            counts.seconds += costs.verify_at(k + 1)
        text.finish(answer)
        counts.tokens += len(answer)
    return counts


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[3, 7, 15])
    parser.add_argument("--answer-tokens", type=int, nargs="+", default=[0, 100_000])
    parser.add_argument(
        "--verify-ms",
        type=float,
        nargs="+",
        default=VERIFY_MS,
        help="at 1, 2, 3 … rows; the rest in proportion",
    )
    arguments = parser.parse_args()
    points = tuple((width, ms / 1000) for width, ms in enumerate(arguments.verify_ms, start=1))
    costs = RoundCosts(points, draft_s=0.0, draft_round_s=0.0, read_s=0.0)
    config = load_config([arguments.config], arguments.overrides).config
    with open_storage(config, read_only=True) as store:
        records = store.requests.load(summary.id for summary in store.requests.list(pair_of(config)))
    print(f"{' '.join(sys.argv)}; {len(records)} answers")
    print("answers kept  draft  tau  speed  had a match  right  expected / right  us a call")
    for kept_tokens in arguments.answer_tokens:
        for draft_tokens in arguments.draft_tokens:
            c = go_through(records, costs, draft_tokens, kept_tokens)
            speed = c.tokens * costs.verify_at(1) / c.seconds
            print(
                f"{kept_tokens:12} {draft_tokens:6} {c.tokens / c.rounds:4.2f} {speed:6.2f} "
                f"{c.matches / c.rounds:12.2f} "
                f"{c.accepted / max(1, c.drafted):6.2f} {c.expected / max(1, c.accepted):17.2f} "
                f"{statistics.median(c.call_us):10.0f}"
            )


if __name__ == "__main__":
    main()
