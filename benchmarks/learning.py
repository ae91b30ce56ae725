"""What the draft learns from traffic, and what each part of the recipe is worth.

The target answers prompts of two kinds of traffic greedily: a quartermaster's log (a persona set by a system
prompt, `draftloop.cli.traffic`) and, with `--prompts FILE`, any mixed file. A part of each is held out. Each
recipe trains a LoRA on the draft from the rest, as `draftloop train` does, and is replayed on everything that
was held out: tau at K, alpha, and alpha of every other domain.

    python benchmarks/learning.py --generator transformers --prompts prompts.jsonl             # a GPU
    python benchmarks/learning.py --requests 24 --held-out 8 --max-tokens 48 --recipes guide   # a CPU

`--generator transformers` lets transformers answer in batches, with the target's 4-bit weights unpacked to
bfloat16, because the engine decodes one stream at a time; p is read by this project's own backend either way.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import AdapterForm, LoraSpec
from draftloop.backends.registry import open_backend
from draftloop.backends.training import Example, Objective, TrainerSettings
from draftloop.cli.traffic import SYSTEM, quartermaster_prompts
from draftloop.config.schema import LoraSettings, TrainingSettings
from draftloop.learning.continuation import starting_point
from draftloop.learning.training import TrainingJob, run_training
from draftloop.models.messages import Message
from draftloop.models.resolve import resolve
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.metrics import expected_acceptance_rate, expected_rounds
from draftloop.types import TRACE_TOP_TOKENS, Rules, Sampling

if TYPE_CHECKING:
    from draftloop.backends.base import Model
    from draftloop.storage.records import RunPoint

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QV = ("q_proj", "v_proj")


def recipe(modules: tuple[str, ...] = QV, rank: int = 8, **settings: Any) -> TrainingSettings:
    """The guide's recipe with changes; alpha is twice the rank, as the guide has it."""
    lora = LoraSettings(rank=rank, alpha=2 * rank, target_modules=modules)
    return TrainingSettings(lora=lora, **settings)


RECIPES: dict[str, TrainingSettings] = {
    "guide": recipe(),
    "guide-ce": recipe(objective="cross_entropy"),
    "lr3e-4": recipe(learning_rate=3e-4),
    "lr1e-3": recipe(learning_rate=1e-3),
    "lr1e-2": recipe(learning_rate=1e-2),
    "ce3e-4": recipe(learning_rate=3e-4, objective="cross_entropy"),
    "fkl3e-4": recipe(learning_rate=3e-4, objective="forward_kl"),
    "rkl3e-4": recipe(learning_rate=3e-4, objective="reverse_kl"),
    "tv3e-4": recipe(learning_rate=3e-4, objective="total_variation"),
    "r16": recipe(rank=16, learning_rate=3e-4),
    "all-r8": recipe(ALL, learning_rate=3e-4),
    "all-r16": recipe(ALL, 16, learning_rate=3e-4),
    "all-r16-fkl": recipe(ALL, 16, learning_rate=3e-4, objective="forward_kl"),
    "all-r16-1e-3": recipe(ALL, 16, learning_rate=1e-3),
    "all-r32": recipe(ALL, 32, learning_rate=3e-4),
    "mlp-r16": recipe(("gate_proj", "up_proj", "down_proj"), 16, learning_rate=3e-4),
    "attention-r16": recipe(("q_proj", "k_proj", "v_proj", "o_proj"), 16, learning_rate=3e-4),
    "no-replay": recipe(ALL, 16, learning_rate=3e-4, replay_ratio=0.0),
    "replay-half": recipe(ALL, 16, learning_rate=3e-4, replay_ratio=0.5),
    "epochs-6": recipe(ALL, 16, learning_rate=3e-4, num_epochs=6),
    "batch-8": recipe(ALL, 16, learning_rate=3e-4, gradient_accumulation_steps=8),
}


@dataclass(frozen=True, eq=False)
class Traffic:
    """One kind of traffic: examples to learn from, examples held out by domain."""

    name: str
    train: list[Example]
    held_out: dict[str, list[Example]]


class Silent:
    """Prints validations only."""

    def planned(self, total_steps: int, steps_done: int) -> None:
        """Nothing."""

    def point(self, point: RunPoint) -> None:
        """A validation in one line."""
        if point.validation_alpha is not None:
            print(f"    step {point.step}: validation alpha {point.validation_alpha:.4f}", flush=True)


def answer_with_transformers(
    folder: Path, prompts: list[list[int]], max_tokens: int, eos: list[int]
) -> list[list[int]]:
    """Greedy answers, 64 prompts at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from draftloop.backends.architecture import read_architecture, tensor_shapes
    from draftloop.backends.torch.linear import dequantize
    from draftloop.backends.torch.weights import TensorFolder

    architecture = read_architecture(folder)
    tensors = TensorFolder(folder, architecture)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {}
    for name, shape in tensor_shapes(architecture).items():
        if architecture.quantization is not None and len(shape) == 2:
            weight = tensors.affine(name.removesuffix(".weight"), architecture.quantization)
            state[name] = dequantize(weight, torch.bfloat16)
        else:
            state[name] = tensors.dense(name).to(torch.bfloat16)
    config = AutoConfig.from_pretrained(folder)
    for attribute in ("quantization_config", "quantization"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model = model.to(device).eval()
    answers: list[list[int]] = []
    for start in range(0, len(prompts), 64):
        group = prompts[start : start + 64]
        width = max(map(len, group))
        ids = torch.tensor([[eos[0]] * (width - len(one)) + one for one in group], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in group], device=device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=eos,
                pad_token_id=eos[0],
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
            )
        for row in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            answers.append(row[:end])
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return answers


def answer_with_engine(target: Model, prompts: list[list[int]], max_tokens: int, eos: list[int]) -> Any:
    """Greedy answers of the target alone, one after another."""
    from draftloop.speculation.round import decode
    from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt

    pair = Pair(target, None)
    settings = DecodeSettings(Sampling(), max_tokens, frozenset(eos), num_draft_tokens=0, seed=0)
    answers = []
    for prompt in prompts:
        conversation = Conversation(pair)
        for _ in read_prompt(pair, conversation, prompt):
            pass
        rounds = decode(pair, Stream(conversation, settings))
        answers.append([token for outcome in rounds for token in outcome.tokens])
    return answers


def examples_of(target: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[Example]:
    """P of every answer token, read by the target itself, teacher-forced (PyTorch only)."""
    import torch

    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        device = target.decoder.weights.final_norm.device
        ids = torch.tensor([*prompt, *answer[:-1]], device=device)
        with torch.inference_mode():
            hidden = target.decoder.forward(target.new_cache(), ids)[len(prompt) - 1 :]
            probs = target.decoder.head(hidden).softmax(-1)
            top = probs.topk(TRACE_TOP_TOKENS, dim=-1)
        examples.append(
            Example(
                tokens=np.array([*prompt, *answer], np.int32),
                num_prompt_tokens=len(prompt),
                top_ids=top.indices.int().cpu().numpy(),
                top_probs=top.values.cpu().numpy(),
                tail_probs=(1 - top.values.sum(-1)).clamp(min=0).cpu().numpy(),
                rules=Rules(Sampling()),
            )
        )
    return examples


def figures(draft: Model, examples: list[Example], k: int) -> dict[str, float]:
    """Tau, alpha and acceptance rate of the draft as it is."""
    alphas = draft.replay(examples)
    rows = sum(map(len, alphas))
    rounds = sum(expected_rounds(one.tolist(), k) for one in alphas)
    rates = [expected_acceptance_rate(one.tolist(), k) or 0.0 for one in alphas]
    return {
        "tau": rows / rounds,
        "alpha": float(sum(one.sum() for one in alphas)) / rows,
        "acceptance_rate": float(np.mean(rates)),
        "rows": rows,
        "requests": len(examples),
    }


def build_traffic(args: argparse.Namespace, target_folder: Path, target: Model) -> list[Traffic]:
    """Ask, read p, split."""
    tokenizer = Tokenizer.load(target_folder)
    eos = sorted(tokenizer.eos_token_ids)
    persona = [
        tokenizer.chat_tokens([Message("system", SYSTEM), Message("user", text)])
        for text in quartermaster_prompts(args.requests + args.held_out)
    ]
    asked: list[tuple[str, str, list[int]]] = [("persona", "persona", one) for one in persona]
    if args.prompts:
        lines = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
        for line in lines[: args.mixed or None]:
            tokens = tokenizer.chat_tokens([Message("user", line["prompt"])])
            if len(tokens) <= args.longest_prompt:
                asked.append(("mixed", line.get("task", "mixed"), tokens))
    prompts = [one for *_, one in asked]
    started = time.perf_counter()
    if args.generator == "transformers":
        answers = answer_with_transformers(target_folder, prompts, args.max_tokens, eos)
    else:
        answers = answer_with_engine(target, prompts, args.max_tokens, eos)
    print(f"{len(prompts)} answers in {time.perf_counter() - started:.0f} s", flush=True)
    examples = examples_of(target, prompts, answers)
    print(f"p of {sum(one.num_rows for one in examples)} positions read", flush=True)
    traffics = []
    for name in dict.fromkeys(kind for kind, *_ in asked):
        train: list[Example] = []
        held_out: dict[str, list[Example]] = {}
        share = (args.requests + args.held_out) // max(1, args.held_out)
        for index, ((kind, task, _), example) in enumerate(zip(asked, examples, strict=True)):
            if kind == name and index % share == share - 1:
                held_out.setdefault(task, []).append(example)
            elif kind == name:
                train.append(example)
        traffics.append(Traffic(name, train, held_out))
    return traffics


def run_recipe(
    backend: Any,
    folder: Path,
    settings: TrainingSettings,
    traffic: Traffic,
    rates: list[float],
    threshold: float,
) -> tuple[Any, Any]:
    """Train as `draftloop train` does; the best adapter and how it went."""
    ids = range(len(traffic.train))
    validation = [i for i in ids if i % 16 == 15]
    failures = [i for i in ids if i not in validation and rates[i] < threshold]
    others = [i for i in ids if i not in validation and rates[i] >= threshold]
    lora = settings.lora
    spec = LoraSpec(lora.rank, lora.alpha, tuple(lora.target_modules))
    start = starting_point(read_architecture(folder), spec, None, settings.seed)
    trainer = backend.new_trainer(
        folder, start, TrainerSettings(Objective(settings.objective), gradient_checkpointing=False)
    )
    with tempfile.TemporaryDirectory() as place:
        job = TrainingJob(
            examples=dict(enumerate(traffic.train)),
            failures=failures,
            replay=others,
            validation=validation,
            settings=settings,
            start=start,
            checkpoint=Path(place) / "checkpoint",
        )
        return run_training(trainer, job, Silent(), lambda: False), len(failures)


def main() -> None:
    """Measure every recipe on every kind of traffic."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="package:qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="package:qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--generator", choices=("engine", "transformers"), default="engine")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--longest-prompt", type=int, default=1500)
    parser.add_argument("--prompts", type=Path, help="a mixed JSONL file, for the second kind of traffic")
    parser.add_argument("--mixed", type=int, default=0, help="only so many of its prompts")
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--thresholds", default="all", help="all (everything is a failure), or numbers")
    parser.add_argument("--traffic", default="persona,mixed")
    parser.add_argument("--train-on", type=int, default=0, help="learn from so many requests only")
    parser.add_argument("--batch-size", type=int, default=1, help="of the effective 4; a GPU takes 4 at once")
    parser.add_argument("--keep", type=Path, help="keep the answers there, and use those of an earlier run")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    backend = open_backend(args.backend, args.device)
    print(backend.capabilities(), flush=True)
    target_folder, draft_folder = resolve(args.target), resolve(args.draft)
    if args.keep and args.keep.exists():
        traffics = pickle.loads(args.keep.read_bytes())
    else:
        target = backend.load(target_folder, max_kv_cache_tokens=args.longest_prompt + args.max_tokens)
        traffics = build_traffic(args, target_folder, target)
        del target
    if args.keep:
        args.keep.write_bytes(pickle.dumps(traffics))
    if args.train_on:
        traffics = [replace(one, train=one.train[: args.train_on]) for one in traffics]
    draft = backend.load(draft_folder, max_kv_cache_tokens=args.longest_prompt + args.max_tokens)
    held_out = {task: rows for traffic in traffics for task, rows in traffic.held_out.items()}
    k = args.num_draft_tokens
    bare = {task: figures(draft, rows, k) for task, rows in held_out.items()}
    results: list[dict[str, Any]] = [{"recipe": "bare", "domains": bare}]
    for task, values in bare.items():
        print(f"bare {task}: tau {values['tau']:.3f} alpha {values['alpha']:.4f} ({values['rows']} rows)")
    for traffic in traffics:
        if traffic.name not in args.traffic.split(","):
            continue
        rates = [expected_acceptance_rate(one.tolist(), k) or 0.0 for one in draft.replay(traffic.train)]
        for name in args.recipes.split(","):
            for word in args.thresholds.split(","):
                threshold = 2.0 if word == "all" else float(word)
                batch = {
                    "batch_size": args.batch_size,
                    "gradient_accumulation_steps": RECIPES[name].gradient_accumulation_steps
                    // args.batch_size,
                }
                settings = RECIPES[name].model_copy(update=batch)
                print(f"{traffic.name} / {name} / failures below {word}", flush=True)
                result, count = run_recipe(backend, draft_folder, settings, traffic, rates, threshold)
                draft.set_adapter(result.lora, AdapterForm.UNFUSED)
                after = {task: figures(draft, rows, k) for task, rows in held_out.items()}
                draft.set_adapter(None, AdapterForm.UNFUSED)
                results.append(
                    {
                        "traffic": traffic.name,
                        "recipe": name,
                        "threshold": word,
                        "failures": count,
                        "steps": result.steps,
                        "skipped": result.skipped_steps,
                        "seconds": round(result.trained_s, 1),
                        "tokens": result.tokens,
                        "domains": after,
                    }
                )
                show(traffic, bare, after, result)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def show(traffic: Traffic, bare: Any, after: Any, result: Any) -> None:
    """One recipe's figures: in its own traffic, and what it did elsewhere."""
    own = list(traffic.held_out)
    tokens = sum(after[task]["rows"] for task in own)
    tau_before = tokens / sum(bare[t]["rows"] / bare[t]["tau"] for t in own)
    tau_after = tokens / sum(after[t]["rows"] / after[t]["tau"] for t in own)
    alpha_change = sum((after[t]["alpha"] - bare[t]["alpha"]) * after[t]["rows"] for t in own) / tokens
    others = {t: after[t]["alpha"] - bare[t]["alpha"] for t in after if t not in own}
    worst = min(others.items(), key=lambda item: item[1], default=("-", 0.0))
    print(
        f"  tau {tau_before:.3f} -> {tau_after:.3f} ({tau_after / tau_before - 1:+.1%}), "
        f"alpha {alpha_change:+.4f}; "
        f"worst elsewhere {worst[0]} {worst[1]:+.4f}; {result.steps} steps in {result.trained_s:.0f} s, "
        f"{result.tokens / result.process_s:.0f} tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
