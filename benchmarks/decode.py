"""Decoding speed on this machine: target alone, speculating, and llama.cpp on the same GGUF files.

Prints tokens/s (medians over prompts, all contenders interleaved prompt by prompt in one run), the
paired ratios, the overhead of one decode step beyond its raw matrix products, and memory.

    python benchmarks/decode.py [--config FILE] [--prompts FILE] [--max-tokens N] [--without-llama-cpp]

llama.cpp runs in a process of its own (xllamacpp, `pip install 'draftloop[bench]'`) on the GGUF files that
the package pair was converted from, with as many threads as PyTorch uses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from draftloop.config import load_config
from draftloop.engine import Engine, Request
from draftloop.loading import load_engine
from draftloop.models.tokenizer import Message
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from draftloop.backends.torch.backend import TorchModel

WARM_UP_TOKENS = 8
OVERHEAD_STEPS = 40


def step_overhead_ms(model: TorchModel, context_tokens: int = 128) -> tuple[float, float]:
    """Medians over interleaved pairs: one decode step, and what it takes beyond its matrix products."""
    import torch

    decoder = model.decoder
    shapes = model.architecture
    hidden = torch.randn(1, shapes.hidden_size).to(decoder.dtype)
    mixed = torch.randn(1, shapes.num_heads * shapes.head_dim).to(decoder.dtype)
    inner = torch.randn(1, shapes.intermediate_size).to(decoder.dtype)
    cache = model.new_cache()
    model.logits(cache, [1] * context_tokens)

    def matmuls() -> None:
        for layer in decoder.weights.layers:
            layer.qkv(hidden)
            layer.output(mixed)
            layer.gate_up(hidden)
            layer.down(inner)
        decoder.weights.head(hidden)

    steps, beyond = [], []
    with torch.inference_mode():
        for _ in range(OVERHEAD_STEPS):
            started = time.perf_counter()
            matmuls()
            middle = time.perf_counter()
            decoder.head(decoder.forward(cache, torch.tensor([1])))
            ended = time.perf_counter()
            cache.trim(1)
            steps.append((ended - middle) * 1e3)
            beyond.append((ended - middle - (middle - started)) * 1e3)
    return statistics.median(steps), statistics.median(beyond)


def serve_llama_cpp(
    pipe: Connection, target: str, draft: str | None, num_draft_tokens: int, threads: int
) -> None:
    """Answer chats with llama.cpp until the pipe closes: [prompt, max_tokens] in, its timings out."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = target
    params.n_ctx = 4096
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if draft:
        params.speculative.draft.mparams.path = draft
        params.speculative.draft.n_max = num_draft_tokens
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    server = xllamacpp.Server(params)
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        messages, max_tokens = job
        answer = server.handle_chat_completions(
            {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0, "cache_prompt": False}
        )
        pipe.send(answer["timings"])


class LlamaCpp:
    """llama.cpp in a child process."""

    def __init__(self, target: Path, draft: Path | None, num_draft_tokens: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(
            target=serve_llama_cpp,
            args=(
                child,
                str(target),
                str(draft) if draft else None,
                num_draft_tokens,
                threads,
            ),
            daemon=True,
        )
        self._process.start()
        self._pipe.recv()

    def tokens_per_s(self, messages: Sequence[Message], max_tokens: int) -> float:
        """Decode one prompt greedily."""
        self._pipe.send(([{"role": m.role, "content": m.content} for m in messages], max_tokens))
        timings: dict[str, Any] = self._pipe.recv()
        return float(timings["predicted_per_second"])

    def close(self) -> None:
        """End the child."""
        self._pipe.send(None)
        self._process.join()


def our_tokens_per_s(
    engine: Engine, messages: Sequence[Message], max_tokens: int, k: int
) -> tuple[float, Any]:
    """Decode one prompt greedily; also the tally."""
    completion = engine.complete(
        Request(
            prompt_tokens=engine.tokenizer.chat_tokens(messages),
            sampling=Sampling(temperature=0.0),
            max_tokens=max_tokens,
            num_draft_tokens=k,
            seed=0,
        )
    )
    return completion.tokens_per_s or 0.0, completion.tally


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--without-llama-cpp", action="store_true")
    arguments = parser.parse_args()
    config = load_config([arguments.config], []).config
    engine = load_engine(config)
    prompts = [json.loads(line) for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
    contenders: dict[str, Any] = {"target": 0}
    contenders |= {f"speculative K={k}": k for k in arguments.num_draft_tokens}
    if not arguments.without_llama_cpp:
        target, draft = (gguf_of(name) for name in (config.models.target.name, config.models.draft.name))
        threads = psutil.cpu_count(logical=False) or 1
        contenders["llama.cpp"] = LlamaCpp(target, None, 0, threads)
        k = config.speculative.num_draft_tokens
        contenders["llama.cpp with draft"] = LlamaCpp(target, draft, k, threads)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    taus: dict[str, list[float]] = {name: [] for name in contenders}
    for index, prompt in enumerate([prompts[0], *prompts]):
        messages = [Message("user", prompt["prompt"])]
        max_tokens = arguments.max_tokens if index else WARM_UP_TOKENS
        for name, contender in contenders.items():
            if isinstance(contender, LlamaCpp):
                speed = contender.tokens_per_s(messages, max_tokens)
            else:
                speed, tally = our_tokens_per_s(engine, messages, max_tokens, contender)
                if index:
                    taus[name].append(tally.tau)
            if index:
                speeds[name].append(speed)
        print(f"{index}/{len(prompts)} prompts", file=sys.stderr)
    report(engine, speeds, taus)
    for contender in contenders.values():
        if isinstance(contender, LlamaCpp):
            contender.close()


def gguf_of(name: str) -> Path:
    """The GGUF file that a package model was converted from."""
    from draftloop.models.packages import gguf_path, package_model

    return gguf_path(package_model(name))


def cpu_name() -> str:
    """As /proc/cpuinfo has it, else the machine's type."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


def llama_cpp_version() -> str:
    """The package that carries llama.cpp."""
    return f"xllamacpp {version('xllamacpp')}" if find_spec("xllamacpp") else "without llama.cpp"


def report(engine: Engine, speeds: dict[str, list[float]], taus: dict[str, list[float]]) -> None:
    """Print the tables."""
    capabilities = engine.backend.capabilities()
    print(f"{cpu_name()}; {capabilities.backend} {capabilities.version} on {capabilities.device}")
    print(f"{' '.join(sys.argv)}; {llama_cpp_version()}")
    for name, values in speeds.items():
        ratios = [ours / base for ours, base in zip(values, speeds["target"], strict=True)]
        tau = f", tau {statistics.mean(taus[name]):.2f}" if taus[name] else ""
        ratio = statistics.median(ratios)
        print(f"{name:22} {statistics.median(values):6.2f} tok/s, {ratio:.2f} of target alone{tau}")
    for role, model in (("target", engine.pair.target), ("draft", engine.pair.draft)):
        step, beyond = step_overhead_ms(model)  # type: ignore[arg-type]
        print(f"{role}: decode step {step:.1f} ms, {beyond:.1f} ms of it beyond the matrix products")
    memory = psutil.Process().memory_info()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"memory: {memory.rss / 1e9:.2f} GB resident now, {peak / 1e9:.2f} GB at the most")


if __name__ == "__main__":
    main()
