"""Many answers at once: total tokens a second, and how long an answer waits for its next tokens.

For each number of streams with the draft and without, in turn, so that a busy moment hits all. A stream asks
its next prompt as soon as it is answered, as clients of a server do: answers of equal length, prompts
included. What counts is the time in which all streams are busy; answers that end alone at last would tell
the speed of fewer streams. One stream is one answer after another. Last, what reading a long prompt costs
those who are being answered meanwhile.

    python benchmarks/batching.py [--config FILE] [--streams 1,2,4,8,16] [--tokens 96] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.answers import Failed, RoundDone
from draftloop.cli.prompts import read_prompts
from draftloop.config import load_config
from draftloop.engine import Request
from draftloop.loading import load_engine, sampling_of
from draftloop.models.tokenizer import Message
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from draftloop.batch import Batch
    from draftloop.config.schema import Config
    from draftloop.engine import Engine
    from draftloop.member import Member

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

    def __init__(
        self, engine: Engine, config: Config, texts: Sequence[str], *, num_tokens: int, num_answers: int
    ) -> None:
        self._engine = engine
        self._config = config
        self._texts = texts
        self._num_tokens = num_tokens
        self._num_answers = num_answers

    def request(self, text: str, *, draft: bool, num_tokens: int | None = None) -> Request:
        """Of exactly so many tokens."""
        length = num_tokens or self._num_tokens
        return Request(
            prompt_tokens=self._engine.tokenizer.chat_tokens([Message("user", text)]),
            sampling=sampling_of(self._config),
            max_tokens=length,
            min_tokens=length,
            num_draft_tokens=self._config.speculative.num_draft_tokens if draft else 0,
        )

    def together(self, num_streams: int, *, draft: bool) -> Run:
        """So many streams, each with `num_answers` answers, one after another.

        The first ones differ in length: else all streams would end, and read their next prompts, at once.
        """
        texts = islice(cycle(self._texts), num_streams * self._num_answers)
        lengths = [self._num_tokens * (stream + 1) // num_streams for stream in range(num_streams)]
        requests = deque(
            self.request(text, draft=draft, num_tokens=length)
            for text, length in zip_longest(texts, lengths, fillvalue=self._num_tokens)
        )
        with self._engine.batch(num_streams) as batch:
            return served(batch, requests)

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


def served(batch: Batch, requests: deque[Request]) -> Run:
    """Whoever finds a place joins. Timed from all first tokens to the first end with nobody waiting."""
    last_s: dict[Member, float] = {}
    gaps_s: list[float] = []
    tokens, started_s, end_s, num_streams = 0, None, 0.0, batch.places
    while requests or (len(batch.members) == num_streams):
        while requests and batch.places:
            batch.join(requests.popleft())
        for member, done in rounds(batch):
            end_s = time.perf_counter()
            if started_s is not None:
                tokens += len(done.outcome.tokens)
                gaps_s += [end_s - last_s[member]] if member in last_s else []
            last_s[member] = end_s
        if started_s is None and len(last_s) >= num_streams:
            started_s = end_s
    if started_s is None or not gaps_s:
        raise SystemExit("no two tokens came while all streams were busy: raise --tokens or --answers")
    return Run(tokens / (end_s - started_s), tuple(gaps_s))


def rounds(batch: Batch) -> Iterator[tuple[Member, RoundDone]]:
    """What one step brings whom."""
    for member, event in batch.step():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, RoundDone):
            yield member, event


def rounds_until(batch: Batch, reader: Member | None = None, steps: int | None = None) -> tuple[float, ...]:
    """Step until all are done, or `reader` has read its prompt, or so often; each answer's gaps."""
    last_s: dict[Member, float] = {}
    gaps_s = []
    while batch.members and steps != 0 and (reader is None or reader.reads):
        steps = None if steps is None else steps - 1
        for member, _ in rounds(batch):
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
    parser.add_argument("--answers", type=int, default=3, help="of each stream")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=0, help="repeats before, where a GPU records rounds")
    parser.add_argument("--long-prompt", type=int, default=3000, help="tokens; 0: none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load_config([arguments.config], [*overrides(arguments.temperature), *arguments.overrides]).config
    engine = load_engine(config)
    texts = [prompt.text for prompt in read_prompts(PROMPTS)]
    bench = Bench(engine, config, texts, num_tokens=arguments.tokens, num_answers=arguments.answers)
    print(engine.backend.capabilities().device)
    counts = [int(count) for count in arguments.streams.split(",")]
    runs: dict[tuple[int, bool], list[Run]] = defaultdict(list)
    for repeat in range(-arguments.warm_ups, arguments.repeats):
        for count in counts:
            # Whoever goes first finds the other's learning or a cold machine: they change places.
            for draft in (repeat % 2 == 0, repeat % 2 == 1):
                run = bench.together(count, draft=draft)
                if repeat >= 0:
                    runs[count, draft].append(run)
    figures = tabled(runs)
    if arguments.long_prompt:
        before_s, meanwhile_s = bench.beside_a_prompt(arguments.long_prompt)
        figures["long prompt"] = {"before_s": before_s, "meanwhile_s": meanwhile_s}
        print(
            f"while {arguments.long_prompt} tokens are read: 95 % of gaps below {meanwhile_s * 1e3:.0f} ms, "
            f"{meanwhile_s / before_s:.2f}x of before"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def overrides(temperature: float) -> list[str]:
    """Nothing of a text must be known from the run before, and rounds be those that were calibrated."""
    settings = {
        "memory.prefix_cache_megabytes": 0,
        "speculative.suffix.enabled": "false",
        "storage.collect": "false",
        "speculative.temperature": temperature,
    }
    return [f"{name}={value}" for name, value in settings.items()]


def tabled(runs: Mapping[tuple[int, bool], Sequence[Run]]) -> dict[str, dict[str, float]]:
    """Print the medians by (streams, with the draft), and what they are of one stream's and of plain ones."""
    figures = {}
    fewest = min(count for count, _ in runs)
    for (count, draft), found in sorted(runs.items(), key=lambda item: (item[0][0], not item[0][1])):
        one_by_one = [runs[fewest, True], runs[fewest, False]]
        figures[f"{count} streams, {'draft' if draft else 'plain'}"] = figure = {
            "tokens_per_s": statistics.median(run.tokens_per_s for run in found),
            "over_plain": ratio(found, runs[count, False]),
            "over_fewest_streams": min(ratio(found, one) for one in one_by_one),
            "p95_gap_s": statistics.median(run.p95_s for run in found),
        }
        print(
            f"{count:>3} streams, {'draft' if draft else 'plain'}: {figure['tokens_per_s']:7.1f} tok/s, "
            f"{figure['over_plain']:5.3f} of plain, {figure['over_fewest_streams']:5.2f} of {fewest} as fast "
            f"as it can be, 95 % of gaps below {figure['p95_gap_s'] * 1e3:5.0f} ms"
        )
    return figures


def ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """The median of one over the other, run by run."""
    pairs = zip(runs, others, strict=True)
    return statistics.median(run.tokens_per_s / other.tokens_per_s for run, other in pairs)


if __name__ == "__main__":
    main()
