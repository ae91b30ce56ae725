"""Training speed and memory on this machine: ours beside peft + transformers, on the same draft and batches.

Prints tokens/s (medians over steps; padding does not count), processor seconds a step, and the peak of
resident memory while training. Each contender is a process of its own; they take turns step by step, so that
whatever else the machine does meets all of them.

    python benchmarks/training.py [--model NAME] [--steps N] [--batch-size N] [--max-tokens N]
        [--shared-tokens N] [--json]

peft trains transformers' own model class on bfloat16 weights that are unpacked from the same folder, with
cross-entropy on the response positions. Needs `pip install 'draftloop[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import LoraSpec, new_lora
from draftloop.backends.training import Example, Objective, TrainerSettings
from draftloop.models.resolve import resolve
from draftloop.types import TRACE_TOP_TOKENS, Rules, Sampling

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LEARNING_RATE = 1e-4
RULES = Rules(Sampling(temperature=1.0))
"""So that cross-entropy is the same number for all: peft knows no temperature."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to train. kind: `ours` or `peft`; variant: the objective, or how attention is computed."""

    kind: str
    variant: str
    checkpointing: bool

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.kind} {self.variant}{', checkpointing' if self.checkpointing else ''}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What everybody trains on."""

    folder: Path
    spec: LoraSpec
    threads: int
    batches: list[list[Example]]


def examples(
    count: int, max_tokens: int, vocab_size: int, shared_tokens: int = 0, seed: int = 0
) -> list[Example]:
    """Texts of random ids, from half of `max_tokens` to all of it, 40 % the prompt; p is random too.

    Before that, all of them begin with the same `shared_tokens` ids: a system prompt.
    """
    random = np.random.default_rng(seed)
    shared = random.integers(0, vocab_size, shared_tokens)
    made = []
    for _ in range(count):
        length = int(random.integers(max_tokens // 2, max_tokens + 1))
        prompt = length * 2 // 5
        rows = length - prompt
        tops = [random.choice(vocab_size, TRACE_TOP_TOKENS, replace=False) for _ in range(rows)]
        probs = random.dirichlet(np.full(TRACE_TOP_TOKENS + 1, 0.2), rows).astype(np.float32)
        tokens = np.concatenate((shared, random.integers(0, vocab_size, length))).astype(np.int32)
        prompt += shared_tokens
        made.append(Example(tokens, prompt, np.array(tops, np.int32), probs[:, :-1], probs[:, -1], RULES))
    return made


def serve(pipe: Connection, contender: Contender, plan: Plan) -> None:
    """Make the batches' steps as they are asked for by index, until None comes."""
    import torch

    torch.set_num_threads(plan.threads)
    step = {"ours": ours, "peft": peft}[contender.kind](contender, plan)
    forget_peak()
    pipe.send("ready")
    while (index := pipe.recv()) is not None:
        processor_s, started_s = time.process_time(), time.perf_counter()
        loss = step(index)
        pipe.send(
            {
                "seconds": time.perf_counter() - started_s,
                "processor_s": time.process_time() - processor_s,
                "loss": loss,
                "peak_bytes": peak_bytes(),
            }
        )


def ours(contender: Contender, plan: Plan) -> Any:
    """A step of Draftloop's trainer."""
    from draftloop.backends.registry import open_backend

    settings = TrainerSettings(Objective(contender.variant), contender.checkpointing)
    lora = new_lora(read_architecture(plan.folder), plan.spec, seed=0)
    trainer = open_backend("torch", device="cpu").new_trainer(plan.folder, lora, settings)
    return lambda index: trainer.step([plan.batches[index]], LEARNING_RATE).loss


def peft(contender: Contender, plan: Plan) -> Any:
    """A step of peft's LoRA on transformers' model, with Adam."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = dense_model(plan.folder, contender.variant)
    if contender.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(
        r=plan.spec.rank, lora_alpha=plan.spec.alpha, target_modules=list(plan.spec.target_modules)
    )
    adapted = get_peft_model(model, config)
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    padded = [pad(batch) for batch in plan.batches]

    def step(index: int) -> float:
        ids, attended, labels = padded[index]
        adam.zero_grad(set_to_none=True)
        loss = adapted(input_ids=ids, attention_mask=attended, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        return float(loss.detach())

    return step


def dense_model(folder: Path, attention: str) -> Any:
    """Transformers' model class with the folder's weights, bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from draftloop.backends.torch.linear import dequantize
    from draftloop.backends.torch.weights import TensorFolder

    architecture = read_architecture(folder)
    tensors = TensorFolder(folder, architecture)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    weights = {}
    for name in dict(model.named_parameters()):
        module = name.removesuffix(".weight")
        if architecture.quantization is None or (not name.endswith("_proj.weight") and "embed" not in name):
            weights[name] = tensors.dense(name).to(torch.bfloat16)
        else:
            weights[name] = dequantize(tensors.affine(module, architecture.quantization), torch.bfloat16)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    # Its one buffer that no checkpoint holds.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def pad(batch: list[Example]) -> tuple[Any, Any, Any]:
    """Ids, attention mask and labels [B, longest]; only response tokens have labels."""
    import torch

    longest = max(len(example.tokens) for example in batch)
    ids, attended = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
    labels = torch.full((len(batch), longest), -100)
    for row, example in enumerate(batch):
        length = len(example.tokens)
        ids[row, :length] = torch.tensor(example.tokens, dtype=torch.long)
        attended[row, :length] = 1
        labels[row, example.num_prompt_tokens : length] = ids[row, example.num_prompt_tokens : length]
    return ids, attended, labels


def forget_peak() -> None:
    """Loading is not training: count the peak from here on (Linux; elsewhere it counts from the start)."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def peak_bytes() -> int:
    """The peak of resident memory, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Child:
    """A contender in its process."""

    def __init__(self, contender: Contender, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, contender, plan), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def step(self, index: int) -> dict[str, float]:
        """Train on one batch."""
        self._pipe.send(index)
        measured: dict[str, float] = self._pipe.recv()
        return measured

    def close(self) -> None:
        """End it."""
        self._pipe.send(None)
        self._process.join()


def contenders(objectives: list[str], attentions: list[str]) -> list[Contender]:
    """All of them, with and without checkpointing."""
    return [
        Contender(kind, variant, checkpointing)
        for checkpointing in (True, False)
        for kind, variants in (("ours", objectives), ("peft", attentions))
        for variant in variants
    ]


def summary(steps: list[dict[str, float]], tokens: list[int]) -> dict[str, float]:
    """Medians over steps, and the peak."""
    return {
        "tokens_per_s": statistics.median(t / s["seconds"] for t, s in zip(tokens, steps, strict=True)),
        "processor_s_per_1000_tokens": statistics.median(
            1000 * s["processor_s"] / t for t, s in zip(tokens, steps, strict=True)
        ),
        "peak_gb": max(s["peak_bytes"] for s in steps) / 1e9,
        "last_loss": steps[-1]["loss"],
    }


def ratios(measured: dict[Contender, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Each of ours over the fastest peft with the same checkpointing, step by step."""
    found = {}
    for contender, steps in measured.items():
        rivals = [c for c in measured if c.kind == "peft" and c.checkpointing == contender.checkpointing]
        if contender.kind != "ours" or not rivals:
            continue
        rival = min(rivals, key=lambda c: sum(s["seconds"] for s in measured[c]))
        quotients = sorted(
            theirs["seconds"] / mine["seconds"] for mine, theirs in zip(steps, measured[rival], strict=True)
        )
        found[f"{contender.name} / {rival.name}"] = {
            "median": statistics.median(quotients),
            "low": quotients[0],
            "high": quotients[-1],
        }
    return found


def cpu_name() -> str:
    """As /proc/cpuinfo has it, else the machine's type."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"{result['machine']}; {result['versions']}")
    print(f"{result['command']}; {result['rows']} response rows of {result['tokens']} tokens in all steps")
    for name, row in result["contenders"].items():
        print(
            f"{name:36} {row['tokens_per_s']:7.1f} tok/s, "
            f"{row['processor_s_per_1000_tokens']:6.1f} processor s per 1000 tokens, "
            f"peak {row['peak_gb']:.2f} GB, last loss {row['last_loss']:.3f}"
        )
    for name, ratio in result["ratios"].items():
        print(f"{name:70} {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="package:qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=192, help="the longest example")
    parser.add_argument("--shared-tokens", type=int, default=0, help="with which all texts begin")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument(
        "--objectives", nargs="*", default=["lk_hybrid", "cross_entropy"], choices=list(Objective)
    )
    parser.add_argument("--attentions", nargs="*", default=["sdpa", "eager"], choices=["sdpa", "eager"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # As Draftloop sets it for itself: waiting threads that spin would rob the others of their time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = Path(resolve(arguments.model))
    size = arguments.batch_size
    # One batch more, to warm up on.
    vocab_size = read_architecture(folder).vocab_size
    count = size * (arguments.steps + 1)
    made = examples(count, arguments.max_tokens, vocab_size, arguments.shared_tokens)
    spec = LoraSpec(arguments.rank, 2.0 * arguments.rank, tuple(arguments.target_modules))
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    plan = Plan(folder, spec, threads, [made[i : i + size] for i in range(0, len(made), size)])
    children = {c: Child(c, plan) for c in contenders(arguments.objectives, arguments.attentions)}
    measured: dict[Contender, list[dict[str, float]]] = {contender: [] for contender in children}
    for index in range(len(plan.batches)):
        for contender, child in children.items():
            step = child.step(index)
            if index:
                measured[contender].append(step)
        print(f"{index}/{arguments.steps} steps", file=sys.stderr)
    for child in children.values():
        child.close()
    batches = plan.batches[1:]
    tokens = [sum(len(example.tokens) for example in batch) for batch in batches]
    result = {
        "command": " ".join(sys.argv),
        "machine": cpu_name(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")),
        "lora": asdict(spec),
        "tokens": sum(tokens),
        "rows": sum(example.num_rows for batch in batches for example in batch),
        "contenders": {c.name: summary(steps, tokens) for c, steps in measured.items()},
        "ratios": ratios(measured),
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        report(result)


if __name__ == "__main__":
    main()
