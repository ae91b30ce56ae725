"""`draftloop benchmark` in parts that may run side by side, each on processors of its own, and their sum.

`run` decodes prompts mode by mode, in turn, and appends a line a prompt to a file, so that what was measured
stays when a run is cut short. Every ratio is within one run, on the processors it was given. `tell` reads
such files and prints, for each temperature and set of modes, medians and ratios by task as `benchmark` does.

    taskset -c 0,1 python benchmarks/shards.py run --prompts FILE --modes target,speculative --out one.jsonl
    python benchmarks/shards.py tell one.jsonl two.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftloop.benchmarking.child import PeerSetup, usable_cores
from draftloop.benchmarking.contenders import Answer, Job, Ours
from draftloop.benchmarking.peers import open_peer, peer_of_mode, peer_setup
from draftloop.benchmarking.run import interleave
from draftloop.benchmarking.summary import Ratio, Summary, summarize
from draftloop.cli.progress import Bars
from draftloop.cli.prompts import NO_TASK, limited, read_prompts
from draftloop.config import load_config
from draftloop.loading import load_prepared, prepare, sampling_of, suffix_tokens
from draftloop.models.messages import Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.benchmarking.contenders import Contender
    from draftloop.config import Config
    from draftloop.engine import Engine
    from draftloop.loading import Prepared

BY_MODEL, BY_MATCHES = ("draft", "speculative"), ("suffix", "speculative")
OURS = ("target", *dict.fromkeys(BY_MODEL + BY_MATCHES))


def our_mode(mode: str, engine: Engine, config: Config) -> Ours:
    """This program, as in `draftloop benchmark --modes`."""
    k = config.speculative.num_draft_tokens if mode in BY_MODEL else 0
    matched = suffix_tokens(config) if mode in BY_MATCHES else 0
    device = engine.backend.capabilities().device
    return Ours(mode, f"draftloop on {device}", engine, engine.experience.anew(), k, matched)


def peer(mode: str, prepared: Prepared, config: Config) -> Contender:
    """Another program, in a process of its own on the same processors."""
    found = peer_of_mode(mode)
    if found is None:
        raise SystemExit(f"there is no mode {mode}")
    setup = PeerSetup(
        target=prepared.target_folder,
        draft=prepared.draft_folder,
        num_draft_tokens=config.speculative.num_draft_tokens,
        max_context_tokens=config.models.target.max_kv_cache_tokens,
        threads=usable_cores(),
        device=config.device,
        eos_token_ids=tuple(sorted(prepared.tokenizer.eos_token_ids)),
    )
    return open_peer(found, mode, peer_setup(found, mode, setup, config, Bars()))


def run(arguments: argparse.Namespace) -> None:
    """Measure, and append to the file as answers come."""
    wanted = [f"generation.max_tokens={arguments.max_tokens}", "storage.collect=false"]
    wanted += [f"speculative.temperature={arguments.temperature}", *arguments.set]
    config = load_config([arguments.config], wanted).config
    prompts = limited(read_prompts(arguments.prompts), arguments.limit)
    prepared = prepare(config)
    jobs = [
        Job(
            tuple(prepared.tokenizer.chat_tokens([Message("user", prompt.text)])),
            arguments.max_tokens,
            sampling_of(config),
            seed=0,
        )
        for prompt in prompts
    ]
    engine, modes = load_prepared(config, prepared), arguments.modes.split(",")
    with ExitStack() as stack, arguments.out.open("a", encoding="utf-8") as file:
        contenders: list[Contender] = []
        for mode in modes:
            contender = our_mode(mode, engine, config) if mode in OURS else peer(mode, prepared, config)
            if not isinstance(contender, Ours):
                stack.enter_context(contender)
            contenders.append(contender)
        named = {one.name: one.description for one in contenders}
        print(json.dumps(named, indent=1), file=sys.stderr)
        answered = interleave(contenders, jobs, lambda *_: None)
        for prompt, answers in zip(prompts, answered, strict=True):
            line = {
                "name": arguments.name,
                "task": prompt.task or NO_TASK,
                "id": prompt.id,
                "temperature": arguments.temperature,
                "answers": {mode: asdict(answer) for mode, answer in answers.items()},
            }
            file.write(json.dumps(line) + "\n")
            file.flush()


def shown(ratio: Ratio) -> str:
    """A median and its interval."""
    if ratio.median is None:
        return "-"
    interval = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.median:.2f}{interval}"


def print_part(task: str, summary: Summary, wanted: Sequence[str]) -> None:
    """A task's medians and ratios in a row."""
    speeds = " ".join(
        f"{mode} {figures.tokens_per_s or 0:.1f}" + (f" (tau {figures.tau:.2f})" if figures.tau else "")
        for mode, figures in summary.modes.items()
    )
    ratios = "; ".join(f"{name} {shown(ratio)}" for name, ratio in summary.ratios.items() if name in wanted)
    print(f"{task:16} {summary.prompts:4} prompts  tok/s {speeds}\n{'':16} {ratios}")


def tell(arguments: argparse.Namespace) -> None:
    """Print every temperature and set of modes that stands in the files."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in arguments.files:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            key = line["name"], line["temperature"], tuple(line["answers"])
            groups.setdefault(key, []).append(line)
    for (name, temperature, modes), lines in sorted(groups.items()):
        print(f"\n{name} temperature {temperature:g}: {', '.join(modes)}")
        tasks: dict[str, list[dict[str, Answer]]] = {}
        for line in lines:
            answers = {mode: Answer(**line["answers"][mode]) for mode in modes}
            tasks.setdefault(line["task"], []).append(answers)
        whole = [answers for part in tasks.values() for answers in part]
        wanted = [ratio for ratio in summarize(whole, {}).ratios if not ratio.startswith("target/")]
        for task, part in (*tasks.items(), ("all", whole)):
            print_part(task, summarize(part, {}), wanted)
        for over, under in (name.split("/") for name in wanted if name.endswith("/target")):
            pairs = [(one[over].tokens_per_s, one[under].tokens_per_s) for one in whole]
            known = [a / b for a, b in pairs if a and b]
            slower = sum(ratio < 1 for ratio in known)
            print(f"{over}/{under} below 1 at {slower} of {len(known)} prompts, lowest {min(known):.2f}")


def main() -> None:
    """Measure, or sum up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    measured = commands.add_parser("run", help="measure")
    measured.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    measured.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    measured.add_argument("--limit", type=int, help="only the first N prompts of each task")
    measured.add_argument("--modes", default="target,draft,speculative")
    measured.add_argument("--max-tokens", type=int, default=128)
    measured.add_argument("--temperature", type=float, default=0.0)
    measured.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    measured.add_argument("--name", default="", help="keeps runs apart that are told together")
    measured.add_argument("--out", type=Path, required=True)
    measured.set_defaults(do=run)
    told = commands.add_parser("tell", help="sum up")
    told.add_argument("files", type=Path, nargs="+")
    told.set_defaults(do=tell)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
