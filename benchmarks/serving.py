"""Soak `draftloop serve`: clients that cancel, stall and send rubbish at random, and what it costs.

Counts what came back, looks at memory after a warm-up and at the end, and waits until nobody is answered and
nobody waits. With a real pair, whose rounds are long enough to be told apart from outside, it measures in how
many of them the place of a client that goes away in mid-answer is free. Prints a summary; exits 1 where there
was a 5xx, a wrong answer, a stuck queue, memory that grew by more than 5 %, or a place that took more than
one round.

    python benchmarks/serving.py [--requests 2000 | --minutes 30] [--config FILE] [--clients 8] [--seed 0]

Toys from tests/ answer, unless `--config` names a settings file whose pair does.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "server")]

from servers import Running, running  # noqa: E402
from traffic import Crowd, Target, read_status  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from traffic import Tally

TOY_OPTIONS = {
    "backend": "numpy",
    "speculative.schedule": "fixed",
    "memory.prefix_cache_megabytes": 1,
    "models.target.max_kv_cache_tokens": 512,
    "models.draft.max_kv_cache_tokens": 512,
}
WARM_UP = 0.2
"""This share of the run comes before memory is looked at."""
FLAT = 1.05
LEAVERS = 20
REST_S = 600.0
"""A queue that is not empty by then is stuck."""


def main() -> int:
    """Start, ask, sum up; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--requests", type=int, default=2000)
    how_long.add_argument("--minutes", type=float)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48, help="the longest answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="settings of a pair in place of toys")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        options = options_of(arguments.config, Path(folder))
        server = stack.enter_context(running(options, Path(folder), "--no-learn"))
        problems = asyncio.run(soak(server, arguments))
        server.process.terminate()
        if server.process.wait(REST_S):
            problems.append(f"it ended with status {server.process.returncode}")
    for problem in problems:
        print(f"- {problem}")
    return 1 if problems else 0


def options_of(config: Path | None, folder: Path) -> list[str]:
    """Global options; the toys are written. What is stored is forgotten afterwards."""
    values: dict[str, object] = {"storage.directory": folder / "data"}
    files = []
    if config is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        import toys

        target, draft = toys.write_toy_pair(folder / "toys")
        values |= {**TOY_OPTIONS, "models.target.name": target, "models.draft.name": draft}
    else:
        files = ["--config", str(config.resolve())]
    return [*files, *(word for key, value in values.items() for word in ("--set", f"{key}={value}"))]


async def soak(server: Running, arguments: argparse.Namespace) -> list[str]:
    """Everything that went wrong, in words."""
    too_many_words = 400 if arguments.config is None else 6000
    prompts = prompts_of(arguments.config)
    target = Target(server.port, server.model, arguments.max_tokens, prompts, too_many_words)
    warm, rest = limits(arguments)
    warm_up = Crowd(target, clients=arguments.clients, seed=arguments.seed + 1)
    await warm_up.ask(warm)
    await server.at_rest()
    before_bytes, began_s, counted = server.resident_bytes, time.perf_counter(), await server.figures()
    crowd = Crowd(target, clients=arguments.clients, seed=arguments.seed)
    await crowd.ask(rest)
    asked_s = time.perf_counter() - began_s
    problems = [*warm_up.tally.wrong, *crowd.tally.wrong]
    try:
        counts = await asyncio.wait_for(server.at_rest(), REST_S)
    except TimeoutError:
        return [*problems, f"the queue is stuck: {await server.figures()}"]
    # What is kept of past texts is bounded by a setting, and may still be filling up.
    kept_bytes = counts["prefix_cache_bytes"] - counted["prefix_cache_bytes"]
    growth = (server.resident_bytes - kept_bytes) / before_bytes - 1
    errors = warm_up.tally.server_errors + crowd.tally.server_errors
    show(crowd.tally, asked_s, {key: value - counted.get(key, 0) for key, value in counts.items()})
    print(
        f"memory after the warm-up ({warm_up.tally.requests} requests) {before_bytes / 1e6:.1f} MB, "
        f"at the end {100 * growth:+.1f} %, beside {kept_bytes / 1e6:+.1f} MB of past texts that are kept"
    )
    problems += [f"{errors} answers with a status of 500 or above"] if errors else []
    problems += [f"memory grew by {100 * growth:.1f} %"] if growth > FLAT - 1 else []
    if arguments.config is not None:
        rounds = [await rounds_of_a_leaver(server, target) for _ in range(LEAVERS)]
        print(f"rounds until a place is free, {LEAVERS} clients that left, at least and at most: {rounds}")
        problems += [f"a place was free after {max(rounds)[0]} rounds"] if max(rounds)[0] > 1 else []
    return problems


def limits(arguments: argparse.Namespace) -> tuple[Callable[[], bool], Callable[[], bool]]:
    """Whether one more request is to come: in the warm-up, and after it."""
    if arguments.minutes is None:
        first = int(WARM_UP * arguments.requests)
        return counted_down(iter(range(first))), counted_down(iter(range(arguments.requests - first)))
    ends = itertools.accumulate([WARM_UP, 1 - WARM_UP])
    began_s, total_s = time.monotonic(), 60 * arguments.minutes
    warm_s, rest_s = (began_s + share * total_s for share in ends)
    return lambda: time.monotonic() < warm_s, lambda: time.monotonic() < rest_s


def counted_down(left: Iterator[int]) -> Callable[[], bool]:
    """Yes, so many times."""
    return lambda: next(left, None) is not None


def prompts_of(config: Path | None) -> tuple[str, ...]:
    """What is asked: the benchmarks' prompts of a real pair, a few words of toys."""
    if config is None:
        return tuple(f"Say {number} in words." for number in range(40))
    lines = (ROOT / "benchmarks" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines if line)


async def rounds_of_a_leaver(server: Running, target: Target) -> tuple[int, int]:
    """How many rounds are still made for a client that goes away in the middle of an answer: between so many.

    Rounds are counted just before it goes, just behind, and when its place is free.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    asked = target.chat(random.Random(0), stream=True, max_tokens=400, temperature=0)
    asked["messages"] = [{"role": "user", "content": "Write the numbers from 1 to 300 in words."}]
    writer.write(target.post(asked))
    await read_status(reader)
    await reader.readuntil(b'"content":"')
    before = await server.figures()
    writer.transport.abort()
    behind = await server.figures()
    after = await server.at_rest()
    return int(rounds_in(after) - rounds_in(behind)), int(rounds_in(after) - rounds_in(before))


def rounds_in(counts: dict[str, float]) -> float:
    """All of them."""
    return sum(value for key, value in counts.items() if key.startswith("rounds_total"))


def show(tally: Tally, asked_s: float, counts: dict[str, float]) -> None:
    """The summary; `counts` are of the same time."""
    print(f"{tally.requests} requests in {asked_s:.0f} s: {dict(sorted(tally.kinds.items()))}")
    statuses: dict[int, int] = {}
    for (_, status), count in tally.statuses.items():
        statuses[status] = statuses.get(status, 0) + count
    print(f"statuses {dict(sorted(statuses.items()))}, {tally.server_errors} of them 5xx")
    ended = {
        key.partition(" ")[2]: int(value)
        for key, value in counts.items()
        if key.startswith("requests_total ") and value
    }
    print(f"as the server saw it {ended}")
    tokens = counts["tokens_total completion"]
    print(f"{tokens:.0f} tokens in {rounds_in(counts):.0f} rounds, {tokens / asked_s:.1f} tokens/s in all")
    if len(tally.first_token_s) > 1:
        cuts = statistics.quantiles(tally.first_token_s, n=20)
        print(f"time to the first token: median {cuts[9]:.3f} s, 95 % below {cuts[18]:.3f} s")
    if tally.wrong:
        print(f"{len(tally.wrong)} answers that should not be")


if __name__ == "__main__":
    sys.exit(main())
