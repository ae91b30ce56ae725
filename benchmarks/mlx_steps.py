"""A round on MLX with its steps traced once and with graphs built anew, in turn, on toys.

`python benchmarks/mlx_steps.py [--layers 24] [--rounds 40]`. Toys are so small that a round's time is
Python's and the launches' alone: what a compiled step can save. Prints milliseconds a round and the median of
the paired ratios. Needs mlx and mlx-lm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from draftloop.backends.mlx.backend import SWITCH, MlxBackend
from draftloop.speculation.round import run_round
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import Sampling

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import toys

PROMPT = [token % 200 for token in range(3, 43)]
WARM_UP_ROUNDS = 4


def begin(pair: Pair, sampling: Sampling, k: int, max_tokens: int) -> Stream:
    """A stream whose prompt is read."""
    conversation = Conversation(pair)
    for _ in read_prompt(pair, conversation, PROMPT):
        pass
    settings = DecodeSettings(sampling, max_tokens, frozenset(), k, seed=1, min_tokens=1, trace=True)
    return Stream(conversation, settings)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    given = parser.parse_args()
    room = len(PROMPT) + (given.rounds + WARM_UP_ROUNDS + 1) * (given.num_draft_tokens + 1)
    with tempfile.TemporaryDirectory() as folder:
        folders = toys.write_toy_pair(Path(folder), num_layers=given.layers, noise=0.05)
        pairs = {}
        for name, switch in (("compiled", "1"), ("anew", "0")):
            os.environ[SWITCH] = switch
            backend = MlxBackend(given.device)
            pairs[name] = Pair(*(backend.load(one, max_kv_cache_tokens=room) for one in folders))
            print(name, "on", backend.capabilities().device)
        for label, sampling in (("greedy", Sampling()), ("temperature 0.7, top-p 0.9", Sampling(0.7, 0.9))):
            streams = {
                name: begin(pair, sampling, given.num_draft_tokens, room) for name, pair in pairs.items()
            }
            took: dict[str, list[float]] = {name: [] for name in pairs}
            for turn in range(WARM_UP_ROUNDS + given.rounds):
                for name in sorted(pairs, reverse=bool(turn % 2)):
                    started_s = time.perf_counter()
                    run_round(pairs[name], [streams[name]])
                    took[name].append(1000 * (time.perf_counter() - started_s))
            compiled, anew = (took[name][WARM_UP_ROUNDS:] for name in ("compiled", "anew"))
            ratio = statistics.median(b / a for a, b in zip(compiled, anew, strict=True))
            print(
                f"{label}: K = {given.num_draft_tokens}, {given.layers} layers: "
                f"{statistics.median(compiled):.2f} ms a round compiled, "
                f"{statistics.median(anew):.2f} anew; ratio {ratio:.2f}"
            )


if __name__ == "__main__":
    main()
