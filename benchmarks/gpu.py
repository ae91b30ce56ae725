"""Decoding steps on an NVIDIA GPU: plain, as a CUDA graph, and as a graph of fused kernels.

Random weights in the shapes of Qwen2.5 0.5B, 1.5B and 7B, bfloat16 and 4-bit: nothing is downloaded. Prints
the time of one step for each number of rows, its share of what memory bandwidth allows (the bytes of the
weights over 3.35 TB/s, an H100's), greedy tokens/s through the seam, and the time of a speculative round. Or,
with `--streams`, what steps take that so many sequences share.

    python benchmarks/gpu.py [--models 0.5B 1.5B 7B] [--bits 16 4] [--context-tokens N] [--bandwidth-tb-s X]
        [--streams 1 4 16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from draftloop.backends.architecture import Architecture, Quantization
from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.backends.torch.backend import TorchModel
from draftloop.backends.torch.cuda.shapes import Reading
from draftloop.backends.torch.linear import AffineWeight, DenseLinear, int4_linear
from draftloop.backends.torch.weights import DenseEmbedding, Layer, Weights
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {
    "0.5B": (896, 24, 14, 2, 64, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 128, 8960, 151936),
    "7B": (3584, 28, 28, 4, 128, 18944, 152064),
}
ROWS = (1, 2, 3, 5, 9)
SHARED_DRAFTS = (0, 1, 2, 3, 4, 6)
CACHE_TOKENS = 2048
GROUP_SIZE = 32
GREEDY = Rules(Sampling())
DEVICE = torch.device("cuda")


def architecture_of(name: str, quantized: bool) -> Architecture:
    """Qwen2.5 of this size."""
    hidden, layers, heads, groups, width, inner, vocabulary = SHAPES[name]
    return Architecture(
        model_type="qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=width,
        intermediate_size=inner,
        max_position_tokens=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        tied_embeddings=name != "7B",
        attention_bias=True,
        qk_norm=False,
        quantization=Quantization(GROUP_SIZE, 4) if quantized else None,
        dtype="bfloat16",
        eos_token_ids=(),
    )


def random_linear(rows: int, columns: int, quantized: bool, biased: bool = False) -> Any:
    """A layer whose outputs are about as large as its inputs."""
    bias = torch.randn(rows, device=DEVICE, dtype=torch.bfloat16) if biased else None
    if not quantized:
        weight = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        return DenseLinear(weight.mul_(columns**-0.5), bias)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), device=DEVICE, dtype=torch.int32)
    scales = torch.full((rows, columns // GROUP_SIZE), 0.2 * columns**-0.5, device=DEVICE)
    return int4_linear([AffineWeight(words, scales, scales * -7.5)], bias, GROUP_SIZE, torch.bfloat16, DEVICE)


def random_model(name: str, quantized: bool) -> TorchModel:
    """Weights drawn on the device."""
    shapes = architecture_of(name, quantized)
    linear = shapes.linear_shapes
    hidden = shapes.hidden_size

    def norm() -> torch.Tensor:
        return torch.ones(hidden, device=DEVICE)

    layers = tuple(
        Layer(
            input_norm=norm(),
            qkv=random_linear(linear["q_proj"][0] + 2 * linear["k_proj"][0], hidden, quantized, biased=True),
            q_norm=None,
            k_norm=None,
            output=random_linear(*linear["o_proj"], quantized),
            post_norm=norm(),
            gate_up=random_linear(2 * shapes.intermediate_size, hidden, quantized),
            down=random_linear(*linear["down_proj"], quantized),
        )
        for _ in range(shapes.num_layers)
    )
    head = random_linear(shapes.vocab_size, hidden, quantized)
    linears = [m for layer in layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    dense = head if isinstance(head, DenseLinear) else random_linear(shapes.vocab_size, hidden, False)
    weights = Weights(
        embedding=DenseEmbedding(dense.weight),
        layers=layers,
        final_norm=norm(),
        head=head,
        num_bytes=sum(m.num_bytes for m in (*linears, head)),
    )
    loader: Any = SimpleNamespace(architecture=shapes, dtype=torch.bfloat16, device=DEVICE)
    return TorchModel(loader, weights, CACHE_TOKENS)


def device_ms(run: Callable[[], object], repeats: int = 30) -> float:
    """Median of the device's own time."""
    times = []
    for _ in range(repeats + 5):
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended))
    return statistics.median(times[5:])


def wall_ms(run: Callable[[], object], repeats: int = 40) -> float:
    """Median of the host's time, for what ends with a transfer to it."""
    times = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[5:])


def step_times(model: TorchModel, context_tokens: int) -> list[tuple[int, float, float, float]]:
    """Rows, then ms of the plain step, of a graph of it, and of the graph of fused kernels."""
    cache, found = model.new_cache(), []
    model.prefill([PrefillJob(cache, [1] * context_tokens)])
    for rows in ROWS:
        ids = torch.full((rows,), 5, device=DEVICE)

        def plain(ids: torch.Tensor = ids) -> torch.Tensor:
            logits = model.decoder.head(model.decoder.forward(cache, ids))
            cache.trim(len(ids))
            return logits

        def fused(ids: torch.Tensor = ids) -> None:
            reading = Reading(cache, len(ids))
            if model._steps is None or model._steps.logits([reading], ids) is None:
                raise SystemExit("this device records no graphs")
            cache.trim(len(ids))

        graph = torch.cuda.CUDAGraph()
        plain()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            plain()
        found.append((rows, device_ms(plain), device_ms(graph.replay), device_ms(fused)))
    return found


def round_ms(target: TorchModel, draft: TorchModel | None, k: int, context_tokens: int) -> float:
    """One greedy round through the seam: K drafted tokens and their verification, host's time."""
    models = [target] if draft is None else [target, draft]
    caches = [model.new_cache() for model in models]
    for model, cache in zip(models, caches, strict=True):
        model.prefill([PrefillJob(cache, [1] * context_tokens)])
    numbers = np.zeros(k, np.float32)

    def one() -> None:
        proposal = NO_PROPOSAL
        if draft is not None:
            proposal = draft.propose([ProposeJob(caches[1], (5,), k, GREEDY, numbers)])[0]
            caches[1].trim(k)
        target.verify([VerifyJob(caches[0], 5, proposal, GREEDY, numbers, np.zeros(k + 1, np.float32))])
        caches[0].trim(k + 1 if draft else 1)

    return wall_ms(one)


def shared_ms(model: TorchModel, streams: int, k: int, context_tokens: int, *, drafts: bool) -> float:
    """What `streams` sequences take together, host's time: each drafts K tokens, or verifies so many."""
    caches = [model.new_cache() for _ in range(streams)]
    for cache in caches:
        model.prefill([PrefillJob(cache, [1] * context_tokens)])
    numbers = np.zeros(k + 1, np.float32)
    guesses = Proposal((1,) * k, None, k)
    propose = [ProposeJob(cache, (5,), k, GREEDY, numbers[:k]) for cache in caches]
    verify = [VerifyJob(cache, 5, guesses, GREEDY, numbers[:k], numbers) for cache in caches]

    def one() -> None:
        if drafts:
            int(model.propose(propose)[-1].tokens[-1])
        else:
            model.verify(verify)
        for cache in caches:
            cache.trim(cache.position - context_tokens)

    return wall_ms(one)


def report_shared(name: str, model: TorchModel, arguments: argparse.Namespace) -> None:
    """Print what sharing costs: a line for each number of sequences, a column for each K."""
    for drafts in (False, True):
        print(f"\n{name}: ms to {'draft' if drafts else 'verify'} K tokens for each of so many sequences")
        print("streams" + "".join(f"  K = {k:2}" for k in SHARED_DRAFTS))
        for streams in arguments.streams:
            times = [
                shared_ms(model, streams, k, arguments.context_tokens, drafts=drafts)
                if k or not drafts
                else 0.0
                for k in SHARED_DRAFTS
            ]
            print(f"{streams:7}" + "".join(f"{ms:8.3f}" for ms in times), flush=True)


def report(name: str, quantized: bool, model: TorchModel, arguments: argparse.Namespace) -> float:
    """Print one model's table; the ms of one greedy token through the seam."""
    floor = model.weight_bytes / arguments.bandwidth_tb_s / 1e9
    kind = "4-bit" if quantized else "bf16"
    print(f"\n{name} {kind}: {model.weight_bytes / 1e9:.2f} GB of weights, {floor:.3f} ms to read them")
    print("rows   plain    graph    fused   share of bandwidth")
    for rows, plain, graph, fused in step_times(model, arguments.context_tokens):
        print(f"{rows:4} {plain:7.2f}  {graph:7.3f}  {fused:7.3f}   {floor / fused:.0%}")
    alone = round_ms(model, None, 0, arguments.context_tokens)
    print(f"target alone, through the seam: {alone:.3f} ms a token, {1e3 / alone:.0f} tok/s")
    return alone


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--bits", nargs="*", type=int, choices=(16, 4), default=[16, 4])
    parser.add_argument("--context-tokens", type=int, default=256)
    parser.add_argument("--bandwidth-tb-s", type=float, default=3.35)
    parser.add_argument("--streams", nargs="*", type=int, default=[])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, context {arguments.context_tokens}")
    for quantized in (bits == 4 for bits in arguments.bits):
        draft = None
        for name in arguments.models:
            model = random_model(name, quantized)
            if arguments.streams:
                report_shared(f"{name} {'4-bit' if quantized else 'bf16'}", model, arguments)
                continue
            alone = report(name, quantized, model, arguments)
            if draft is not None:
                for k in (3, 4, 6):
                    ms = round_ms(model, draft, k, arguments.context_tokens)
                    print(f"round with the smallest as draft, K = {k}: {ms:.3f} ms, {ms / alone:.2f} alone")
            draft = draft or model
            del model


if __name__ == "__main__":
    main()
