"""LoRA training under MLX: our trainer beside mlx-lm's own, on one model, one LoRA shape and one batch.

Prints tokens/s (medians over steps, all contenders interleaved step by step in one run) and peak memory.
Every contender has a process of its own: mlx-lm's gradient checkpointing changes a class for good, and
peaks must not mix. Tokens that are padding do not count.

    python benchmarks/training_mlx.py [--model FOLDER] [--lengths 160,160,160,160] [--steps N] [--json]

Without --model a toy is made: MLX's build for a Linux CPU is too slow for anything else. mlx-lm minimizes
cross-entropy alone; ours is shown with that and with `lk_hybrid`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

RANK, SCALE, MODULES = 8, 2.0, ("q_proj", "v_proj")
PROMPT_SHARE = 0.4
LEARNING_RATE = 1e-4
TOY = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_layers": 6,
    "intermediate_size": 192,
    "vocab_size": 4096,
    "tied": True,
}
CONTENDERS = ("mlx-lm", "ours, cross_entropy", "ours, lk_hybrid")


def texts(lengths: list[int], vocab_size: int) -> list[tuple[list[int], int]]:
    """Random tokens, and how many of them are the prompt."""
    random = np.random.default_rng(0)
    return [(random.integers(0, vocab_size, n).tolist(), int(n * PROMPT_SHARE)) for n in lengths]


def run_mlx_lm(
    pipe: Connection, folder: str, device: str, lengths: list[int], checkpointing: bool, steps: int
) -> None:
    """mlx-lm's `train`, held up after every step until the parent says go."""
    import mlx.core as mx
    from mlx.optimizers import Adam
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    class Gate(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            pipe.send(1 / info["iterations_per_second"])
            pipe.recv()

    if device != "auto":
        mx.set_default_device(mx.Device(getattr(mx, device)))
    network, config = load_model(Path(folder))
    network.freeze()
    shape = {
        "rank": RANK,
        "scale": SCALE,
        "dropout": 0.0,
        "keys": {f"self_attn.{name}" for name in MODULES},
    }
    linear_to_lora_layers(network, len(network.layers), shape)
    batch = texts(lengths, config["vocab_size"])
    pipe.send("ready")
    pipe.recv()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        plan = TrainingArgs(
            batch_size=len(batch),
            iters=steps,
            steps_per_report=1,
            steps_per_save=steps + 1,
            adapter_file=f"{scratch}/adapters.safetensors",
            grad_checkpoint=checkpointing,
        )
        train(network, Adam(LEARNING_RATE, bias_correction=True), batch, args=plan, training_callback=Gate())
    _send_memory(pipe, mx.get_peak_memory())


def run_ours(
    pipe: Connection,
    folder: str,
    device: str,
    lengths: list[int],
    checkpointing: bool,
    steps: int,
    objective: str,
) -> None:
    """Our trainer, a step whenever the parent says go."""
    import mlx.core as mx

    from draftloop.backends.architecture import read_architecture
    from draftloop.backends.lora import LoraSpec, new_lora
    from draftloop.backends.registry import open_backend
    from draftloop.backends.training import Example, Objective, TrainerSettings
    from draftloop.types import Rules, Sampling

    architecture = read_architecture(Path(folder))
    random = np.random.default_rng(1)
    batch = []
    for tokens, num_prompt_tokens in texts(lengths, architecture.vocab_size):
        rows = len(tokens) - num_prompt_tokens
        probs = random.dirichlet(np.full(33, 0.3), rows).astype(np.float32)
        ids = [random.choice(architecture.vocab_size, 32, replace=False) for _ in range(rows)]
        batch.append(
            Example(
                tokens=np.array(tokens, np.int32),
                num_prompt_tokens=num_prompt_tokens,
                top_ids=np.array(ids, np.int32),
                top_probs=probs[:, :32],
                tail_probs=probs[:, 32],
                rules=Rules(Sampling(temperature=1.0)),
            )
        )
    lora = new_lora(architecture, LoraSpec(RANK, RANK * SCALE, MODULES), seed=0)
    settings = TrainerSettings(Objective(objective), checkpointing)
    trainer = open_backend("mlx", device).new_trainer(Path(folder), lora, settings)
    pipe.send("ready")
    pipe.recv()
    mx.reset_peak_memory()
    for _ in range(steps):
        started = time.perf_counter()
        trainer.step([batch], LEARNING_RATE)
        pipe.send(time.perf_counter() - started)
        pipe.recv()
    _send_memory(pipe, mx.get_peak_memory())


def _send_memory(pipe: Connection, peak_bytes: int) -> None:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((peak_bytes, resident * (1 if sys.platform == "darwin" else 1024)))


def start(name: str, *arguments: Any) -> Connection:
    """A contender in a process of its own, ready for its first step."""
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    function, extra = (run_mlx_lm, ()) if name == "mlx-lm" else (run_ours, (name.removeprefix("ours, "),))
    context.Process(target=function, args=(child, *arguments, *extra), daemon=True).start()
    child.close()
    pipe.recv()
    return pipe


def measure(folder: str, device: str, lengths: list[int], steps: int) -> list[dict[str, Any]]:
    """A row for each contender, with and without gradient checkpointing; the first step warms up."""
    kinds = [(name, checkpointing) for checkpointing in (False, True) for name in CONTENDERS]
    pipes = [start(name, folder, device, lengths, checkpointing, steps + 1) for name, checkpointing in kinds]
    seconds: list[list[float]] = [[] for _ in kinds]
    for _ in range(steps + 1):
        for pipe, taken in zip(pipes, seconds, strict=True):
            pipe.send("go")
            taken.append(pipe.recv())
    rows = []
    for (name, checkpointing), pipe, taken in zip(kinds, pipes, seconds, strict=True):
        pipe.send("end")
        peak_bytes, resident_bytes = pipe.recv()
        rows.append(
            {
                "trainer": name,
                "gradient_checkpointing": checkpointing,
                "tokens_per_s": sum(lengths) / statistics.median(taken[1:]),
                "peak_bytes": peak_bytes,
                "resident_bytes": resident_bytes,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of safetensors; a toy is made without it")
    parser.add_argument("--dense", action="store_true", help="the toy in float32 instead of 4 bits")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--lengths", default="160,160,160,160", help="tokens of each example of the batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    lengths = [int(n) for n in asked.lengths.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.model
        if folder is None:
            sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
            from toys import write_toy_folder

            folder = write_toy_folder(Path(scratch) / "toy", **TOY, quantized=not asked.dense)
        rows = measure(str(folder), asked.device, lengths, asked.steps)
    told = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "model": str(asked.model or f"toy {TOY}, {'float32' if asked.dense else '4 bits'}"),
        "lengths": lengths,
        "steps": asked.steps,
        "rows": rows,
    }
    if asked.json:
        print(json.dumps(told))
        return
    print(f"{told['model']}\n{told['machine']}, {told['versions']}, a batch of {lengths} tokens")
    print(f"{'trainer':<24}{'checkpointing':<16}{'tokens/s':>10}{'peak MB':>10}{'resident MB':>13}")
    for row in rows:
        checkpointing = "on" if row["gradient_checkpointing"] else "off"
        megabytes = f"{row['peak_bytes'] / 1e6:>10.1f}{row['resident_bytes'] / 1e6:>13.0f}"
        print(f"{row['trainer']:<24}{checkpointing:<16}{row['tokens_per_s']:>10.0f}{megabytes}")


if __name__ == "__main__":
    main()
