"""Rounds on MLX, on toys: steps traced once against graphs built anew; sequences together against in turn.

`python benchmarks/mlx_steps.py [--layers 24] [--rounds 40] [--sequences 1,2,4,8,16]`. Toys are so small that
a round's time is Python's and the launches' alone: what compiling and sharing a forward can save. Modes take
turns round by round. Prints milliseconds a round, total tokens a second and the median of the paired ratios.
Needs mlx and mlx-lm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.backends.mlx.backend import SWITCH, MlxBackend
from draftloop.speculation.round import run_round
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    Round = tuple[Pair, list[list[Stream]]]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import toys

PROMPT = [token % 200 for token in range(3, 43)]
WARM_UP_ROUNDS = 4
SAMPLINGS = (("greedy", Sampling()), ("temperature 0.7, top-p 0.9", Sampling(0.7, 0.9)))


def begin(pair: Pair, sampling: Sampling, k: int, max_tokens: int, seed: int = 1) -> Stream:
    """A stream whose prompt is read, of another length for each seed."""
    conversation = Conversation(pair)
    for _ in read_prompt(pair, conversation, PROMPT[seed % len(PROMPT) :] or PROMPT):
        pass
    settings = DecodeSettings(sampling, max_tokens, frozenset(), k, seed=seed, min_tokens=1, trace=True)
    return Stream(conversation, settings)


def in_turns(modes: dict[str, Round], rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Seconds and tokens of each mode's rounds; a mode's round is one of each of its batches."""
    took: dict[str, list[tuple[float, int]]] = {name: [] for name in modes}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name in sorted(modes, reverse=bool(turn % 2)):
            pair, batches = modes[name]
            started_s = time.perf_counter()
            outcomes = [outcome for batch in batches for outcome in run_round(pair, batch)]
            seconds = time.perf_counter() - started_s
            took[name].append((seconds, sum(len(outcome.tokens) for outcome in outcomes)))
    return {name: one[WARM_UP_ROUNDS:] for name, one in took.items()}


def ratio(slow: Sequence[tuple[float, int]], fast: Sequence[tuple[float, int]]) -> float:
    """The median over the pairs of rounds; both modes make the same tokens."""
    return statistics.median(a / b for (a, _), (b, _) in zip(slow, fast, strict=True))


def median_ms(rounds: Sequence[tuple[float, int]]) -> float:
    """Of the rounds' times."""
    return 1000 * statistics.median(seconds for seconds, _ in rounds)


def tokens_per_s(rounds: Sequence[tuple[float, int]]) -> float:
    """Of all rounds."""
    return sum(tokens for _, tokens in rounds) / sum(seconds for seconds, _ in rounds)


def compare_tracing(pairs: dict[str, Pair], rounds: int, k: int, room: int) -> None:
    """One sequence, compiled and anew."""
    for label, sampling in SAMPLINGS:
        took = in_turns(
            {name: (pair, [[begin(pair, sampling, k, room)]]) for name, pair in pairs.items()}, rounds
        )
        compiled, anew = took["compiled"], took["anew"]
        print(
            f"{label}: {median_ms(compiled):.2f} ms a round compiled, {median_ms(anew):.2f} anew; "
            f"ratio {ratio(anew, compiled):.2f}"
        )


def compare_batching(pairs: dict[str, Pair], counts: Sequence[int], rounds: int, k: int, room: int) -> None:
    """Several sequences in shared rounds, compiled and anew, and each in its own, compiled."""
    for label, sampling in SAMPLINGS:
        for count in counts:

            def batch(pair: Pair, sampling: Sampling = sampling, count: int = count) -> list[Stream]:
                return [begin(pair, sampling, k, room, seed) for seed in range(count)]

            took = in_turns(
                {
                    "together": (pairs["compiled"], [batch(pairs["compiled"])]),
                    "anew": (pairs["anew"], [batch(pairs["anew"])]),
                    "in turn": (pairs["compiled"], [[one] for one in batch(pairs["compiled"])]),
                },
                rounds,
            )
            shared, anew, own = took["together"], took["anew"], took["in turn"]
            print(
                f"{label}, {count} sequences: {tokens_per_s(shared):.0f} tok/s together, "
                f"{tokens_per_s(own):.0f} in turn; ratio {ratio(own, shared):.2f}; "
                f"together {ratio(anew, shared):.2f} of graphs built anew",
                flush=True,
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--quantized", action="store_true", help="4 bits")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--sequences", default="", help="such as 1,2,4,8,16: together against in turn")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    given = parser.parse_args()
    k = given.num_draft_tokens
    room = len(PROMPT) + (given.rounds + WARM_UP_ROUNDS + 1) * (k + 1)
    with tempfile.TemporaryDirectory() as folder:
        folders = toys.write_toy_pair(
            Path(folder),
            num_layers=given.layers,
            hidden_size=given.hidden_size,
            intermediate_size=2 * given.hidden_size,
            quantized=given.quantized,
            noise=0.05,
        )
        pairs = {}
        for name, switch in (("compiled", "1"), ("anew", "0")):
            os.environ[SWITCH] = switch
            backend = MlxBackend(given.device)
            pairs[name] = Pair(*(backend.load(one, max_kv_cache_tokens=room) for one in folders))
            print(name, "on", backend.capabilities().device)
    print(f"K = {k}, {given.layers} layers of {given.hidden_size}")
    if not given.sequences:
        compare_tracing(pairs, given.rounds, k, room)
        return
    counts = [int(count) for count in given.sequences.split(",")]
    compare_batching(pairs, counts, given.rounds, k, room)


if __name__ == "__main__":
    main()
