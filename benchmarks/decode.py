"""One decode step of each model on this machine: its time, and what it takes beyond its raw matrix products.

Also the memory that the pair takes. Speed beside the target alone and other programs: `draftloop benchmark`.

    python benchmarks/decode.py [--config FILE]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from draftloop.config import load_config
from draftloop.loading import load_engine

if TYPE_CHECKING:
    from draftloop.backends.torch.backend import TorchModel

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


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    arguments = parser.parse_args()
    engine = load_engine(load_config([arguments.config], []).config)
    capabilities = engine.backend.capabilities()
    print(f"{capabilities.backend} {capabilities.version} on {capabilities.device}")
    for role, model in (("target", engine.pair.target), ("draft", engine.pair.draft)):
        step, beyond = step_overhead_ms(model)  # type: ignore[arg-type]
        print(f"{role}: decode step {step:.1f} ms, {beyond:.1f} ms of it beyond the matrix products")
    memory = psutil.Process().memory_info()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"memory: {memory.rss / 1e9:.2f} GB resident now, {peak / 1e9:.2f} GB at the most")


if __name__ == "__main__":
    main()
