"""What it costs to store traces: answers with and without, prompt by prompt in turn, as paired ratios.

Seconds of an answer are those of its rounds and of the write, its prompt's left out: reading a prompt stores
nothing. The texts of both are the same, so the ratio of the seconds is that of the tokens a second.

    python benchmarks/storing.py [--config FILE] [--prompts FILE] [--count 6] [--max-tokens 48] [--passes 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from draftloop.config import load_config
from draftloop.engine import Engine, Request
from draftloop.learning.recorder import Provenance
from draftloop.loading import load_prepared, open_storage, prepare
from draftloop.models.messages import Message
from draftloop.types import Sampling

STEADY = ("speculative.schedule=fixed",)
"""Both answers of a pair do the same rounds."""


def answered_s(engine: Engine, request: Request) -> tuple[float, tuple[int, ...]]:
    """Seconds of one answer beside its prompt, and its tokens."""
    began_s = time.perf_counter()
    done = engine.complete(request)
    return time.perf_counter() - began_s - done.prompt_s, tuple(done.token_ids)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--prompts", type=Path, default=Path(__file__).with_name("prompts.jsonl"))
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--passes", type=int, default=2)
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.count]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([arguments.config.resolve()], [f"storage.directory={folder}", *STEADY]).config
        with open_storage(config) as store:
            prepared = prepare(config)
            engine = load_prepared(config, prepared, store)
            ratios = []
            for number, line in enumerate(lines * arguments.passes):
                request = Request(
                    prepared.tokenizer.chat_tokens([Message("user", json.loads(line)["prompt"])]),
                    Sampling(temperature=0.0),
                    arguments.max_tokens,
                    config.speculative.num_draft_tokens,
                    seed=0,
                )
                if number == 0:
                    engine.complete(request)
                ways = [
                    ("plain", request),
                    ("stored", replace(request, provenance=Provenance("a", "collect"))),
                ]
                found = {way: answered_s(engine, one) for way, one in (ways if number % 2 else ways[::-1])}
                if found["plain"][1] != found["stored"][1]:
                    raise SystemExit(f"the texts differ: {line}")
                ratios.append(found["stored"][0] / found["plain"][0])
                print(f"{found['plain'][0]:.2f} s, stored {found['stored'][0]:.2f} s: {ratios[-1]:.3f}")
            count = store.requests.count()
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"storing takes {100 * (statistics.median(ratios) - 1):+.1f} % (median of {len(ratios)} pairs, "
        f"quartiles {100 * (quartiles[0] - 1):+.1f} and {100 * (quartiles[2] - 1):+.1f}); {count} stored"
    )


if __name__ == "__main__":
    main()
