"""Many answers at once: total tokens a second, and how long an answer waits for its next tokens.

For each number of streams with the draft and without, in turn, so that a busy moment hits all: greedy answers
of equal length, each from another prompt, prompts included. Beside them the same answers one after another.
Last, what reading a long prompt costs those who are being answered meanwhile.

    python benchmarks/batching.py [--config FILE] [--streams 1,2,4,8,16] [--tokens 96] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.answers import Failed, RoundDone
from draftloop.cli.prompts import read_prompts
from draftloop.config import load_config
from draftloop.engine import Request
from draftloop.loading import load_engine
from draftloop.models.tokenizer import Message
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.batch import Batch, Member
    from draftloop.engine import Engine

PROMPTS = Path(__file__).with_name("prompts.jsonl")
QUANTILE = 0.95


@dataclass(frozen=True, slots=True)
class Run:
    """What one batch took: total tokens a second, and the seconds between two rounds of an answer."""

    tokens_per_s: float
    gaps_s: tuple[float, ...]

    @property
    def p95_s(self) -> float:
        """Of those gaps."""
        return quantile(self.gaps_s)


def quantile(values: Sequence[float]) -> float:
    """The 95th percentile, the next value above."""
    return sorted(values)[min(len(values) - 1, int(QUANTILE * len(values)))]


class Bench:
    """One engine and the requests that it is asked."""

    def __init__(self, engine: Engine, texts: Sequence[str], num_tokens: int, num_draft_tokens: int) -> None:
        self._engine = engine
        self._texts = texts
        self._num_tokens = num_tokens
        self._num_draft_tokens = num_draft_tokens

    def request(self, text: str, *, draft: bool, num_tokens: int | None = None) -> Request:
        """Greedy, and exactly so many tokens."""
        length = num_tokens or self._num_tokens
        return Request(
            prompt_tokens=self._engine.tokenizer.chat_tokens([Message("user", text)]),
            sampling=Sampling(),
            max_tokens=length,
            min_tokens=length,
            num_draft_tokens=self._num_draft_tokens if draft else 0,
            seed=0,
        )

    def together(self, num_streams: int, *, draft: bool) -> Run:
        """So many answers share their rounds."""
        requests = [self.request(text, draft=draft) for text in islice(cycle(self._texts), num_streams)]
        started_s = time.perf_counter()
        with self._engine.batch(num_streams) as batch:
            for request in requests:
                batch.join(request)
            gaps_s = rounds_until(batch)
        tokens = num_streams * self._num_tokens
        return Run(tokens / (time.perf_counter() - started_s), gaps_s)

    def in_turn(self, num_streams: int, *, draft: bool) -> Run:
        """The same answers one after another."""
        requests = [self.request(text, draft=draft) for text in islice(cycle(self._texts), num_streams)]
        started_s = time.perf_counter()
        for request in requests:
            self._engine.complete(request)
        tokens = num_streams * self._num_tokens
        return Run(tokens / (time.perf_counter() - started_s), (0.0,))

    def beside_a_prompt(self, prompt_tokens: int) -> tuple[float, float]:
        """The 95th percentile of two answers' gaps before a long prompt joins them, and while it is read."""
        text = " ".join(self._texts)
        while len(self._engine.tokenizer.encode(text)) < prompt_tokens:
            text += text
        with self._engine.batch(3) as batch:
            for one in self._texts[:2]:
                batch.join(self.request(one, draft=True, num_tokens=600))
            before = rounds_until(batch, steps=40)
            long = self.request(text, draft=True)
            reader = batch.join(
                Request(
                    prompt_tokens=long.prompt_tokens[:prompt_tokens],
                    sampling=Sampling(),
                    max_tokens=1,
                    num_draft_tokens=0,
                )
            )
            meanwhile = rounds_until(batch, reader)
        return quantile(before), quantile(meanwhile)


def rounds_until(batch: Batch, reader: Member | None = None, steps: int | None = None) -> tuple[float, ...]:
    """Step until all are done, or `reader` has read its prompt, or so often; each answer's gaps."""
    last_s: dict[Member, float] = {}
    gaps_s = []
    while batch.members and steps != 0 and (reader is None or reader.reads):
        steps = None if steps is None else steps - 1
        for member, event in batch.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, RoundDone):
                now_s = time.perf_counter()
                if member in last_s:
                    gaps_s.append(now_s - last_s[member])
                last_s[member] = now_s
    return tuple(gaps_s)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--streams", default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-turn", type=int, default=4, help="answers one after another; 0: none")
    parser.add_argument("--long-prompt", type=int, default=3000, help="tokens; 0: none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Nothing of a text must be known from the run before.
    overrides = ["memory.prefix_cache_megabytes=0", "speculative.suffix.enabled=false", *arguments.overrides]
    config = load_config([arguments.config], overrides).config
    engine = load_engine(config)
    texts = [prompt.text for prompt in read_prompts(PROMPTS)]
    bench = Bench(engine, texts, arguments.tokens, config.speculative.num_draft_tokens)
    print(engine.backend.capabilities().device)
    counts = [int(count) for count in arguments.streams.split(",")]
    bench.together(2, draft=True)
    runs: dict[str, list[Run]] = defaultdict(list)
    for _ in range(arguments.repeats):
        for draft in (True, False):
            if arguments.in_turn:
                runs[f"in turn, {_name(draft)}"].append(bench.in_turn(arguments.in_turn, draft=draft))
            for count in counts:
                runs[f"{count} streams, {_name(draft)}"].append(bench.together(count, draft=draft))
    figures = {}
    for name, found in runs.items():
        speed = statistics.median(run.tokens_per_s for run in found)
        p95_s = statistics.median(run.p95_s for run in found)
        base = statistics.median(
            run.tokens_per_s / own.tokens_per_s
            for run, own in zip(found, runs.get("in turn, draft", found), strict=True)
        )
        figures[name] = {"tokens_per_s": speed, "p95_gap_s": p95_s, "over_in_turn_with_draft": base}
        print(f"{name:>22}: {speed:6.1f} tok/s, {base:4.2f}x, 95 % of gaps below {p95_s * 1e3:5.0f} ms")
    if arguments.long_prompt:
        before_s, meanwhile_s = bench.beside_a_prompt(arguments.long_prompt)
        figures["long prompt"] = {"before_s": before_s, "meanwhile_s": meanwhile_s}
        print(
            f"while {arguments.long_prompt} tokens are read: 95 % of gaps below {meanwhile_s * 1e3:.0f} ms, "
            f"{meanwhile_s / before_s:.2f}x of before"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def _name(draft: bool) -> str:
    return "draft" if draft else "plain"


if __name__ == "__main__":
    main()
