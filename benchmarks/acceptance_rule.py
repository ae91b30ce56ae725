"""Two lossless acceptance rules on the same pair and prompts: how many tokens a round each may expect.

Ours keeps a draft token with probability min(1, p/q): in all Σ min(p, q) (Leviathan et al. 2023). mlx-lm's
keeps it only where target and draft, sampling apart from each other, chose the same token: in all Σ p·q. Both
are computed from the same p and q at every position of an answer that the target sampled, prompt by prompt,
and give the expected rounds of that answer (`expected_rounds`).

    python benchmarks/acceptance_rule.py --prompts FILE [--limit N] [--max-tokens N] [--temperature T]

With `--out` a line a prompt is kept in a file; `--tell` sums such files up and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import PrefillJob
from draftloop.backends.numpy.acceptance import warp
from draftloop.benchmarking.summary import paired_ratio
from draftloop.cli.prompts import NO_TASK, limited, read_prompts
from draftloop.config import load_config
from draftloop.engine import Engine, Request
from draftloop.loading import load_engine
from draftloop.models.messages import Message
from draftloop.speculation.metrics import expected_rounds, mean_alpha, tokens_per_round
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.base import Model


@dataclass(frozen=True, slots=True)
class Rule:
    """One answer under one rule: its tokens, the sum of their alphas, and the rounds to expect."""

    tokens: int
    alpha_sum: float
    rounds: float


def distributions(model: Model, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling):
    """[R, V]: the warped distribution that each of the answer's tokens was, or would be, drawn from."""
    cache = model.new_cache()
    model.prefill([PrefillJob(cache, prompt[:-1])])
    return warp(model.logits(cache, [prompt[-1], *answer[:-1]]), sampling)


def compare(
    engine: Engine, prompt: Sequence[int], max_tokens: int, sampling: Sampling, k: int
) -> tuple[Rule, Rule]:
    """Answer one prompt and look along the answer: ours, and where both must choose the same token."""
    answer = engine.complete(
        Request(prompt, sampling, max_tokens=max_tokens, num_draft_tokens=k, seed=0)
    ).token_ids
    p = distributions(engine.pair.target, prompt, answer, sampling)
    q = distributions(engine.pair.draft, prompt, answer, sampling)
    width = min(p.shape[1], q.shape[1])
    p, q = p[:, :width], q[:, :width]
    rules = (np.minimum(p, q).sum(axis=1), (p * q).sum(axis=1))
    ours, same_token = (
        Rule(len(alphas), float(alphas.sum()), float(expected_rounds(alphas, k))) for alphas in rules
    )
    return ours, same_token


def report(name: str, answers: Sequence[tuple[Rule, Rule]]) -> None:
    """Print one line: alpha, tau and kept draft tokens of both rules, and the paired ratio of the last."""
    figures = []
    for rules in zip(*answers, strict=True):
        rows = sum(rule.tokens for rule in rules)
        alpha = mean_alpha(sum(rule.alpha_sum for rule in rules), rows)
        figures.append((alpha, tokens_per_round(rows, sum(rule.rounds for rule in rules))))
    (alpha, tau), (same_alpha, same_tau) = figures
    # Each round adds one token to those that it keeps.
    kept = [[rule.tokens / rule.rounds - 1 for rule in rules] for rules in answers]
    ratio = paired_ratio([ours for ours, _ in kept], [same_token or None for _, same_token in kept])
    interval = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    print(
        f"{name:16} {len(answers):4} prompts {rows:6} tokens   alpha {alpha:.3f} | {same_alpha:.3f}   "
        f"tau {tau:.2f} | {same_tau:.2f}   accepted a round {tau - 1:.2f} | {same_tau - 1:.2f}, "
        f"median ratio {ratio.median or 0:.2f}{interval}"
    )


def measured(arguments: argparse.Namespace) -> list[tuple[str, tuple[Rule, Rule]]]:
    """Each prompt's task and answer, kept in the file as they come."""
    config = load_config([arguments.config], []).config
    engine = load_engine(config)
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p)
    prompts = limited(read_prompts(arguments.prompts), arguments.limit)
    k, answers = config.speculative.num_draft_tokens, []
    print(f"K = {k}, temperature {sampling.temperature:g}, top-p {sampling.top_p:g}")
    for prompt in prompts:
        tokens = engine.tokenizer.chat_tokens([Message("user", prompt.text)])
        rules = compare(engine, tokens, arguments.max_tokens, sampling, k)
        answers.append((prompt.task or NO_TASK, rules))
        print(f"{len(answers)}/{len(prompts)} {answers[-1][0]}", file=sys.stderr)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps([answers[-1][0], [asdict(rule) for rule in rules]]) + "\n")
    return answers


def kept(files: Sequence[Path]) -> list[tuple[str, tuple[Rule, Rule]]]:
    """What `measured` kept in these files."""
    lines = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [(task, (Rule(**ours), Rule(**same_token))) for task, (ours, same_token) in lines]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--limit", type=int, help="only the first N prompts of each task")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="keep a line a prompt in this file")
    parser.add_argument("--tell", type=Path, nargs="+", help="sum these files up instead")
    arguments = parser.parse_args()
    answers = measured(arguments) if arguments.tell is None else kept(arguments.tell)
    print("ours | same token")
    for task in dict.fromkeys(task for task, _ in answers):
        report(task, [rules for name, rules in answers if name == task])
    report("all", [rules for _, rules in answers])


if __name__ == "__main__":
    main()
