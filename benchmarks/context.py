"""Speed against the length of the context: reading a prompt, and decoding behind it.

Prints, for each length, the target's time for the last piece of the prompt and a step, for one decode step
and for one verification of K + 1 rows, the same of the draft, and every one as a ratio to the shortest
length. Medians; the lengths take turns within one run.

    python benchmarks/context.py [--config FILE] [--lengths 1024 4096 8192] [--repeats N] [--toys]

`--toys` runs two random models of a few hundred kilobytes, to try the script itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, VerifyJob
from draftloop.backends.registry import open_backend
from draftloop.config import load_config
from draftloop.loading import load_engine
from draftloop.speculation.stream import PREFILL_CHUNK_TOKENS, Pair
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from draftloop.backends.base import Backend, Cache, Model

ROOM_TOKENS = 16
"""Behind the prompt, for the steps that are measured."""
GREEDY = Rules(Sampling(temperature=0.0))


@dataclass(frozen=True)
class Reader:
    """One model behind a context of one length."""

    model: Model
    cache: Cache

    def read(self, tokens: Sequence[int]) -> None:
        """The last piece of the prompt, once more, and one step, which waits for the device to be done."""
        self.cache.trim(len(tokens))
        self.model.prefill([PrefillJob(self.cache, tokens)])
        self.verify(())

    def verify(self, guesses: Sequence[int]) -> None:
        """One forward over the guesses and the token before them, forgotten afterwards."""
        k = len(guesses)
        proposal = Proposal(tuple(guesses), None, k) if k else NO_PROPOSAL
        uniforms = np.zeros(k + 1, np.float32)
        self.model.verify([VerifyJob(self.cache, 1, proposal, GREEDY, uniforms[:k], uniforms)])
        self.cache.trim(k + 1)


def measure(pair: Pair, lengths: Sequence[int], repeats: int, k: int) -> dict[tuple[str, str, int], float]:
    """Medians in milliseconds by role, work and length."""
    random = np.random.default_rng(0)
    readers = {}
    for role, model in (("target", pair.target), ("draft", pair.draft)):
        for length in lengths if model else ():
            cache = model.new_cache()
            prompt = random.integers(0, model.architecture.vocab_size, length).tolist()
            started_s = time.perf_counter()
            for start in range(0, length, PREFILL_CHUNK_TOKENS):
                model.prefill([PrefillJob(cache, prompt[start : start + PREFILL_CHUNK_TOKENS])])
            spent_s = time.perf_counter() - started_s
            print(f"{role} read {length} tokens at {length / spent_s:.0f} tokens/s", file=sys.stderr)
            readers[role, length] = Reader(model, cache), prompt[-PREFILL_CHUNK_TOKENS:]
    times_ms: dict[tuple[str, str, int], list[float]] = {}
    for repeat in range(repeats + 1):
        for (role, length), (reader, piece) in readers.items():
            works: dict[str, Callable[[], None]] = {
                f"read {len(piece)}+1": lambda reader=reader, piece=piece: reader.read(piece),
                "decode 1": lambda reader=reader: reader.verify(()),
                f"verify {k + 1}": lambda reader=reader, piece=piece: reader.verify(piece[:k]),
            }
            for name, work in works.items():
                started_s = time.perf_counter()
                work()
                # The first time warms up.
                if repeat:
                    spent_ms = (time.perf_counter() - started_s) * 1e3
                    times_ms.setdefault((role, name, length), []).append(spent_ms)
    return {key: statistics.median(values) for key, values in times_ms.items()}


def report(backend: Backend, medians: dict[tuple[str, str, int], float]) -> None:
    """One line for each role, work and length."""
    capabilities = backend.capabilities()
    print(f"{capabilities.backend} {capabilities.version} on {capabilities.device}; {' '.join(sys.argv)}")
    print(f"{'model':7} {'work':11} {'context':>8} {'ms':>9} {'ratio':>6}")
    shortest = min(length for *_, length in medians)
    for (role, name, length), median in sorted(medians.items()):
        # A context shorter than a piece is read in a shorter piece, which has no ratio.
        base = medians.get((role, name, shortest))
        ratio = f"{median / base:6.2f}" if base else ""
        print(f"{role:7} {name:11} {length:8} {median:9.2f} {ratio}")


def toy_pair(folder: Path, backend: Backend, max_tokens: int) -> Pair:
    """Two random models."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from toys import write_toy_pair

    options = {"max_position_tokens": max_tokens}
    target, draft = write_toy_pair(folder, noise=0.05, **options)
    return Pair(*(backend.load(path, max_kv_cache_tokens=max_tokens) for path in (target, draft)))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toys", action="store_true")
    arguments = parser.parse_args()
    max_tokens = max(arguments.lengths) + ROOM_TOKENS
    changes = [f"models.{role}.max_kv_cache_tokens={max_tokens}" for role in ("target", "draft")]
    config = load_config([arguments.config], changes).config
    k = min(config.speculative.num_draft_tokens, ROOM_TOKENS - 1)
    if arguments.toys:
        backend = open_backend(config.backend, config.device)
        with tempfile.TemporaryDirectory() as folder:
            pair = toy_pair(Path(folder), backend, max_tokens)
            report(backend, measure(pair, arguments.lengths, arguments.repeats, k))
        return
    engine = load_engine(config)
    report(engine.backend, measure(engine.pair, arguments.lengths, arguments.repeats, k))


if __name__ == "__main__":
    main()
