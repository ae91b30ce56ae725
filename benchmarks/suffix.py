"""What suffix drafting alone would have brought to the answers in a store. No model is loaded.

Each stored answer is gone through in order, as if the target were to write it once more: what the index would
draft is kept as far as it is what was written. That is the acceptance of greedy answers; sampled ones may
keep more or fewer. The index knows the earlier answers only. Prints tokens a round, how often it had a guess,
how many of its tokens were right, how many it expected to be, and what a call took.

    python benchmarks/suffix.py [--config FILE] [--set storage.directory=DIR] [--draft-tokens 3 7 16]
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
from draftloop.speculation.suffix import SuffixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.storage.records import RequestRecord


@dataclass
class Counts:
    """What happened."""

    rounds: int = 0
    tokens: int = 0
    guesses: int = 0
    drafted: int = 0
    accepted: int = 0
    expected: float = 0.0
    call_us: list[float] = field(default_factory=list)


def go_through(records: Sequence[RequestRecord], max_draft_tokens: int, max_answer_tokens: int) -> Counts:
    """Draft every answer from what was known before each of its tokens."""
    index, counts = SuffixIndex(max_answer_tokens), Counts()
    for record in records:
        answer = record.answer_tokens.tolist()
        text = index.open_text(record.prompt_tokens, len(record.prompt_tokens) + len(answer))
        done = 0
        while done < len(answer):
            started_s = time.perf_counter()
            match = index.match(text, min(max_draft_tokens, len(answer) - done - 1))
            counts.call_us.append((time.perf_counter() - started_s) * 1e6)
            kept = 0
            if match is not None:
                pairs = zip(match.tokens, answer[done:], strict=False)
                kept = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
                index.observe(match, len(match.tokens), kept)
                counts.guesses += 1
                counts.drafted += len(match.tokens)
                chance = 1.0
                for acceptance in match.acceptance:
                    chance *= acceptance
                    counts.expected += chance
            text.extend(answer[done : done + kept + 1])
            done += kept + 1
            counts.rounds += 1
            counts.accepted += kept
        index.add_answer(answer)
        counts.tokens += len(answer)
    return counts


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[3, 7, 16])
    parser.add_argument("--answer-tokens", type=int, nargs="+", default=[0, 100_000])
    arguments = parser.parse_args()
    config = load_config([arguments.config], arguments.overrides).config
    with open_storage(config, read_only=True) as store:
        records = store.requests.load(summary.id for summary in store.requests.list(pair_of(config)))
    print(f"{' '.join(sys.argv)}; {len(records)} answers")
    print("answers kept  draft  tau  had a guess  right  expected / right  us a call")
    for kept_tokens in arguments.answer_tokens:
        for draft_tokens in arguments.draft_tokens:
            c = go_through(records, draft_tokens, kept_tokens)
            print(
                f"{kept_tokens:12} {draft_tokens:6} {c.tokens / c.rounds:4.2f} {c.guesses / c.rounds:12.2f} "
                f"{c.accepted / max(1, c.drafted):6.2f} {c.expected / max(1, c.accepted):17.2f} "
                f"{statistics.median(c.call_us):10.0f}"
            )


if __name__ == "__main__":
    main()
