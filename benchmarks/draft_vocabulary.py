"""The draft's head cut to fewer tokens: what a draft step costs, and what that makes of answers.

Each setting of `speculative.draft_vocabulary` answers each prompt, in turn, so that a busy moment hits all.
What a cut learns from is the store of `--set storage.directory=…`; nothing is stored.

    python benchmarks/draft_vocabulary.py --vocabularies full 32768 [--prompts FILE] [--limit N]
        [--max-tokens N] [--temperature T] [--config FILE] [--set KEY=VALUE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import PrefillJob, ProposeJob
from draftloop.benchmarking.summary import paired_ratio
from draftloop.cli.prompts import NO_TASK, by_task, limited, read_prompts
from draftloop.config import load_config
from draftloop.engine import Completion, Engine, Request
from draftloop.loading import load_prepared, open_storage, prepare
from draftloop.models.messages import Message
from draftloop.speculation.metrics import Tally
from draftloop.storage.store import DATABASE_NAME
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STEPS = 25
CONTEXT_TOKENS = 64


def step_ms(engines: Mapping[str, Engine], sampling: Sampling, text: Sequence[int]) -> dict[str, float]:
    """Milliseconds of one draft step in a text: medians, each draft in turn."""
    caches = {name: engine.pair.draft.new_cache() for name, engine in engines.items()}
    for name, engine in engines.items():
        engine.pair.draft.prefill([PrefillJob(caches[name], [1] * CONTEXT_TOKENS)])
    times: dict[str, list[float]] = {name: [] for name in engines}
    uniforms = np.array([0.5], np.float32)
    for _ in range(STEPS):
        for name, engine in engines.items():
            began_s = time.perf_counter()
            (proposal,) = engine.pair.draft.propose(
                [ProposeJob(caches[name], [1], 1, Rules(sampling), uniforms, text)]
            )
            int(proposal.tokens[-1])
            times[name].append(1000 * (time.perf_counter() - began_s))
            caches[name].trim(1)
    return {name: statistics.median(values) for name, values in times.items()}


def report(task: str, names: Sequence[str], answers: Sequence[Mapping[str, Completion]]) -> None:
    """Print one line for each setting: alpha, tau, and the paired ratio of its speed over the first's."""
    for name in names:
        tally = Tally()
        for answer in answers:
            tally.merge(answer[name].tally)
        speeds, base = ([answer[one].tokens_per_s for answer in answers] for one in (name, names[0]))
        ratio = paired_ratio(speeds, base)
        interval = "" if ratio.low is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
        print(
            f"{task:18} {name:>8} {len(answers):3} prompts   alpha {tally.alpha or 0:.3f}   "
            f"tau {tally.tau or 0:.2f}   {statistics.median(speeds):5.1f} tok/s   "
            f"{ratio.median or 0:.3f} of {names[0]}{interval}",
            flush=True,
        )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--vocabularies", nargs="+", default=["full", "32768"])
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--limit", type=int, help="only the first N prompts of each task")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    names = arguments.vocabularies
    configs = {
        name: load_config(
            [arguments.config],
            [*arguments.overrides, "storage.collect=false", f"speculative.draft_vocabulary={name}"],
        ).config
        for name in names
    }
    first = configs[names[0]]
    stored = (Path(first.storage.directory) / DATABASE_NAME).exists()
    store = open_storage(first, read_only=True) if stored else None
    engines = {name: load_prepared(config, prepare(config), store) for name, config in configs.items()}
    sampling = Sampling(temperature=arguments.temperature, top_p=first.speculative.top_p)
    prompts, answers = limited(read_prompts(arguments.prompts), arguments.limit), []
    text = engines[names[0]].tokenizer.encode(prompts[0].text)
    for name, milliseconds in step_ms(engines, sampling, text).items():
        draft = engines[name].pair.draft
        cut = "whole" if draft.vocabulary is None else draft.vocabulary.name
        print(f"draft step {name:>8} ({cut}): {milliseconds:.2f} ms", flush=True)
    for index, prompt in enumerate(prompts):
        tokens = engines[names[0]].tokenizer.chat_tokens([Message("user", prompt.text)])
        request = Request(
            tokens,
            sampling,
            max_tokens=arguments.max_tokens,
            num_draft_tokens=first.speculative.num_draft_tokens,
            seed=index,
        )
        turn = [*names[index % len(names) :], *names[: index % len(names)]]
        answers.append({name: engines[name].complete(request) for name in turn})
        print(f"{len(answers)}/{len(prompts)} {prompt.task or NO_TASK}", file=sys.stderr)
    for task, part in by_task(prompts, answers).items():
        report(task, names, part)
    report("all", names, answers)


if __name__ == "__main__":
    main()
