"""What training in the background costs those who ask: time to the first token while training and without.

One pair answers in this process; `draftloop train --background` learns in another one, as `serve` and `chat`
start it. Blocks of requests take turns: in one the training process is stopped (SIGSTOP), in the next it goes
on. Prints median and 95th percentile of the time to the first token of both, their ratios, what becomes of
the tokens a second, and how much of its processor time the training keeps while requests come.

    python benchmarks/serving_learning.py [--config FILE] [--toys] [--pairs 5] [--requests 8]
        [--prompt-tokens 200] [--max-tokens 24] [--pause-s 0.5] [--unannounced] [--set KEY=VALUE] [--json]

Requests have prompts of random ids, none like another; about `--pause-s` lies between two of them. One that
other programs took more than a tenth of a processor from until its first token is left out, and counted.
`--unannounced` does not tell the training that somebody answers: lowest priority alone. `--toys` tries the
script itself.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from draftloop.config import load_config
from draftloop.engine import Completion, Engine, Request, RoundDone
from draftloop.learning.background import start_training
from draftloop.loading import load_prepared, open_storage, pair_of, prepare
from draftloop.storage.records import RequestRecord, TraceRows
from draftloop.types import TRACE_TOP_TOKENS, Sampling

if TYPE_CHECKING:
    from draftloop.config import Config
    from draftloop.learning.background import Training
    from draftloop.storage.store import Store

TESTS = Path(__file__).resolve().parents[1] / "tests"
STORED = 40
"""Requests to learn from."""
LONGEST_START_S = 300.0
DISTURBED = 0.1
"""Of a processor: what other programs may take."""
CLOCK_S = 0.05
"""And this: the system counts in hundredths of a second, process by process."""
ENDLESS = (
    "training.num_epochs=100000",
    "training.min_failure_cases=1",
    "speculative.acceptance_threshold=1",
    "speculative.suffix.enabled=false",
    "memory.prefix_cache_megabytes=0",
    "adaptation.auto_train=false",
)
TOYS = (
    "models.target.max_kv_cache_tokens=512",
    "models.draft.max_kv_cache_tokens=512",
    "device=cpu",
    "backend=torch",
)


@dataclass(slots=True)
class Block:
    """What one block of requests found."""

    first_token_s: list[float] = field(default_factory=list)
    disturbed_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    processor_share: float = 0.0


@dataclass(slots=True)
class Lab:
    """The pair that answers, and the process that trains."""

    config: Config
    engine: Engine
    process: psutil.Process
    here: psutil.Process
    random: np.random.Generator

    def asked(self, arguments: argparse.Namespace, *, training: bool) -> Block:
        """Ask some requests one after the other, with pauses, while the process trains or is stopped."""
        self.process.send_signal(signal.SIGCONT if training else signal.SIGSTOP)
        block, before_s, began_s = Block(), self.processor_s(), time.perf_counter()
        for _ in range(arguments.requests):
            # A moment of its own within the training's step.
            time.sleep(arguments.pause_s * self.random.uniform(0.5, 1.5))
            self._ask(arguments, block)
        block.processor_share = (self.processor_s() - before_s) / (time.perf_counter() - began_s)
        return block

    def alone(self, seconds: float) -> float:
        """Processor seconds a second of the training while nobody asks."""
        self.process.send_signal(signal.SIGCONT)
        before_s, began_s = self.processor_s(), time.perf_counter()
        time.sleep(seconds)
        return (self.processor_s() - before_s) / (time.perf_counter() - began_s)

    def processor_s(self) -> float:
        """Used by the training so far."""
        return used_s(self.process)

    def others_s(self) -> float:
        """Processor seconds of all other programs so far."""
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts guests' time twice.
        all_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return float(all_s - idle_s) - used_s(self.process) - used_s(self.here)

    def _ask(self, arguments: argparse.Namespace, block: Block) -> None:
        vocab_size = self.engine.tokenizer.vocab_size
        request = Request(
            prompt_tokens=self.random.integers(0, 9 * vocab_size // 10, arguments.prompt_tokens).tolist(),
            sampling=Sampling(temperature=0.0),
            max_tokens=arguments.max_tokens,
            min_tokens=arguments.max_tokens,
            num_draft_tokens=self.config.speculative.num_draft_tokens,
            seed=0,
        )
        others_s, began_s = self.others_s(), time.perf_counter()
        first_s, disturbed = 0.0, False
        for event in self.engine.stream(request):
            if not first_s and isinstance(event, RoundDone):
                first_s = time.perf_counter() - began_s
                disturbed = self.others_s() - others_s > DISTURBED * first_s + CLOCK_S
            if isinstance(event, Completion) and not disturbed:
                block.tokens_per_s.append(event.tokens_per_s or 0.0)
        (block.disturbed_s if disturbed else block.first_token_s).append(first_s)


def used_s(process: psutil.Process) -> float:
    """Processor seconds of one program so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def fill(store: Store, config: Config, vocab_size: int) -> None:
    """Store requests of random ids that went badly: what they cost to learn from is that of any others."""
    random = np.random.default_rng(0)
    longest = min(config.training.max_sequence_length, config.models.draft.max_kv_cache_tokens)
    prompt_tokens, rows = (192, 128) if longest >= 512 else (32, 32)
    for number in range(STORED):
        tops = [random.choice(vocab_size, TRACE_TOP_TOKENS, replace=False) for _ in range(rows)]
        probs = random.dirichlet(np.full(TRACE_TOP_TOKENS + 1, 0.2), rows).astype(np.float32)
        kept = np.sort(probs[:, :-1])[:, ::-1]
        store.requests.add(
            RequestRecord(
                created_s=time.time(),
                pair=pair_of(config),
                adapter=None,
                domain="random",
                source="collect",
                key=None,
                split_key=str(number),
                prompt_tokens=random.integers(0, 9 * vocab_size // 10, prompt_tokens).astype(np.int32),
                answer_tokens=np.array([top[0] for top in tops], np.int32),
                sampling=Sampling(temperature=1.0),
                min_tokens=1,
                num_draft_tokens=config.speculative.num_draft_tokens,
                seed=number,
                finish_reason="length",
                rounds=rows,
                drafted_tokens=rows,
                accepted_tokens=0,
                tested_tokens=rows,
                alpha_sum=0.1 * rows,
                prompt_s=0.1,
                decode_s=0.1 * rows,
                traces=TraceRows(
                    round_index=np.arange(rows, dtype=np.int32),
                    kinds=np.ones(rows, np.uint8),
                    draft_ids=np.array([top[1] for top in tops], np.int32),
                    draft_probs=np.full(rows, 0.5, np.float32),
                    top_ids=np.array(tops, np.int32),
                    top_logprobs=np.log(np.maximum(kept, 1e-9)),
                    tail_mass=probs[:, -1],
                ),
            )
        )


def wait_for_steps(store: Store, config: Config, training: Training) -> None:
    """Come back when the first step is done.

    Raises:
        SystemExit: it ended, or takes too long.
    """
    pair, until_s = pair_of(config), time.perf_counter() + LONGEST_START_S
    while time.perf_counter() < until_s:
        runs = store.runs.list(pair)
        if runs and any(point.loss is not None for point in store.runs.points(runs[-1].id)):
            return
        if training.wait(0.2):
            break
    raise SystemExit(f"the training did not begin: {training.poll()}")


def percentile95(values: list[float]) -> float:
    """The smallest value that at least 95 % do not exceed."""
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]


def figures(blocks: list[Block]) -> dict[str, Any]:
    """Of all requests in one state.

    Raises:
        SystemExit: none was undisturbed.
    """
    first = [seconds for block in blocks for seconds in block.first_token_s]
    left_out = [seconds for block in blocks for seconds in block.disturbed_s]
    if not first:
        raise SystemExit("other programs disturbed every request")
    return {
        "requests": len(first),
        "left_out": len(left_out),
        "left_out_first_token_s_median": statistics.median(left_out) if left_out else None,
        "first_token_s_median": statistics.median(first),
        "first_token_s_p95": percentile95(first),
        "first_token_s_most": max(first),
        "tokens_per_s_median": statistics.median(one for block in blocks for one in block.tokens_per_s),
    }


def measure(lab: Lab, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pairs of blocks, each in both orders in turn."""
    idle: list[Block] = []
    training: list[Block] = []
    alone: list[float] = []
    lab.asked(argparse.Namespace(**{**vars(arguments), "requests": 2}), training=False)
    for number in range(arguments.pairs):
        for trains in (number % 2 == 0, number % 2 == 1):
            (training if trains else idle).append(lab.asked(arguments, training=trains))
        alone.append(lab.alone(3.0))
        print(f"{number + 1}/{arguments.pairs}", file=sys.stderr)
        for name, block in (("idle", idle[-1]), ("training", training[-1])):
            first = " ".join(f"{seconds:.2f}" for seconds in block.first_token_s)
            others = " ".join(f"{seconds:.2f}" for seconds in block.disturbed_s)
            print(f"  {name}: first tokens after {first} s, left out {others}", file=sys.stderr)
    without, beside = figures(idle), figures(training)
    medians = [
        statistics.median(b.first_token_s) / statistics.median(a.first_token_s)
        for a, b in zip(idle, training, strict=True)
        if a.first_token_s and b.first_token_s
    ]
    return {
        "idle": without,
        "training": beside,
        "ratios": {
            "first_token_s_p95": beside["first_token_s_p95"] / without["first_token_s_p95"],
            "first_token_s_median": {
                "median": statistics.median(medians),
                "low": min(medians),
                "high": max(medians),
            },
            "tokens_per_s": beside["tokens_per_s_median"] / without["tokens_per_s_median"],
        },
        "training_processors": {
            "alone": statistics.median(alone),
            "beside_requests": statistics.median(block.processor_share for block in training),
        },
    }


def toy_settings(folder: Path) -> list[str]:
    """A toy pair in `folder`, and the settings that name it."""
    sys.path.insert(0, str(TESTS))
    from toys import write_toy_pair

    target, draft = write_toy_pair(folder)
    return [f"models.target.name={target}", f"models.draft.name={draft}", *TOYS]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--toys", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--pause-s", type=float, default=0.5)
    parser.add_argument("--unannounced", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # Whoever ends this process shall not leave the other one behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        toys = toy_settings(Path(folder) / "models") if arguments.toys else []
        changes = [f"storage.directory={folder}/data", *ENDLESS, *toys, *arguments.set]
        files = [] if arguments.toys else [arguments.config.resolve()]
        config = load_config(files, changes).config
        options = [word for path in files for word in ("--config", str(path))]
        options += [word for change in changes for word in ("--set", change)]
        with open_storage(config) as store:
            prepared = prepare(config)
            fill(store, config, prepared.tokenizer.vocab_size)
            engine = load_prepared(config, prepared, store)
            if arguments.unannounced:
                engine.answering = nullcontext
            training = start_training(options, Path(config.storage.directory))
            process = psutil.Process(training.pid)
            try:
                wait_for_steps(store, config, training)
                lab = Lab(config, engine, process, psutil.Process(), np.random.default_rng(1))
                result = measure(lab, arguments)
            finally:
                process.kill()
    result["command"] = " ".join(sys.argv[1:])
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
