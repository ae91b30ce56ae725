"""The C kernels against float64 arithmetic and against PyTorch's own steps, and what happens without them."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from draftloop.backends.architecture import read_architecture  # noqa: E402
from draftloop.backends.registry import open_backend  # noqa: E402
from draftloop.backends.torch import linear, operations  # noqa: E402
from draftloop.backends.torch.adapter import adapted_linear  # noqa: E402
from draftloop.backends.torch.decoder import rope_tables  # noqa: E402
from draftloop.backends.torch.linear import AffineWeight, dequantize, int4_linear  # noqa: E402
from draftloop.backends.torch.native import library  # noqa: E402
from draftloop.backends.torch.native.linear import NativeInt4Linear, native_unpack  # noqa: E402
from draftloop.backends.torch.native.operations import NativeOperations  # noqa: E402
from draftloop.backends.torch.operations import EagerOperations, Span, operations_for  # noqa: E402
from draftloop.backends.torch.weights import Layer  # noqa: E402

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(
    library.why_not() is not None, reason=f"no kernels here: {library.why_not()}"
)


def affine(rows, columns, group, seed=0):
    random = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), generator=random, dtype=torch.int32)
    scales = (torch.rand(rows, columns // group, generator=random) * 0.01 + 0.001).bfloat16()
    return AffineWeight(words, scales, (-7 * scales.float()).bfloat16())


def inputs(tokens, columns, seed=1):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    # Real activations have a few channels that are far larger than the rest.
    x[:, 1::97] *= 60
    return x.bfloat16()


@needs_kernels
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [16, 200, 300])
@pytest.mark.parametrize("tokens", [1, 3, 8, 21])
def test_products_are_those_of_the_unpacked_weights(group, rows, tokens):
    parts = [affine(rows - 7, 512, group), affine(7, 512, group, seed=2)]
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(3)).bfloat16()
    layer, x = int4_linear(parts, bias, group, torch.bfloat16, CPU), inputs(tokens, 512)
    assert isinstance(layer, NativeInt4Linear)
    dense = torch.cat([dequantize(part, torch.float64) for part in parts])
    wanted = x.double() @ dense.T + bias.double()
    # The result is rounded to bfloat16, which costs 2^-9 at the most; what the kernel adds is far less.
    torch.testing.assert_close(layer(x).double(), wanted, rtol=2**-8, atol=2e-3)
    nobody = int4_linear(parts, None, group, torch.bfloat16, CPU)
    torch.testing.assert_close(nobody(x).double(), wanted - bias.double(), rtol=2**-8, atol=2e-3)


@needs_kernels
def test_zeros_huge_and_tiny_values_and_what_is_no_number():
    layer = int4_linear([affine(32, 64, 32)], None, 32, torch.bfloat16, CPU)
    x = torch.zeros(6, 64, dtype=torch.bfloat16)
    x[1, 5], x[2, 5], x[3, 5], x[4, 40], x[5, 63] = 1e36, 1e-38, torch.nan, torch.inf, -torch.inf
    y = layer(x)
    assert (y[0] == 0).all()
    assert torch.isfinite(y[1]).all()
    assert y[1].abs().max() > 1e33
    assert y[2].abs().max() < 1e-32
    assert torch.isnan(y[3:]).all()


@needs_kernels
def test_a_products_bits_do_not_depend_on_the_rows_beside_it():
    layer, x = int4_linear([affine(400, 256, 64)], None, 64, torch.bfloat16, CPU), inputs(24, 256)
    together = layer(x)
    for width in range(1, 12):
        assert torch.equal(torch.cat([layer(part) for part in x.split(width)]), together)


@needs_kernels
@pytest.mark.parametrize("group", [32, 64, 128])
def test_unpacked_weights_are_rounded_once(group):
    part, rows = affine(150, 384, group), torch.empty(150, 384, dtype=torch.bfloat16)
    native_unpack(library.load_library(torch.get_num_threads()), part, rows)
    # scale · code + bias is exact in float64, nearly so in float32.
    torch.testing.assert_close(rows.double(), dequantize(part, torch.float64), rtol=2**-8, atol=0)


@needs_kernels
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("ranks", [1, 8, 30])
def test_an_adapter_beside_a_product_is_added_to_it(ranks, stacked):
    weight, x = affine(1040, 256, 64), inputs(11, 256)
    base = int4_linear([weight], None, 64, torch.bfloat16, CPU)
    random = torch.Generator().manual_seed(5)
    a = torch.randn(256, ranks, generator=random).bfloat16()
    b = torch.randn(ranks, 1040, generator=random).bfloat16()
    if stacked:
        # Two modules: each has ranks of its own, and one of them is not adapted in its last rows.
        b[: ranks // 2, 512:], b[ranks // 2 :, :512], b[:, 1024:] = 0, 0, 0
    layer = adapted_linear(base, a, b)
    assert isinstance(layer, NativeInt4Linear)
    y = layer(x)
    wanted = x.double() @ (dequantize(weight, torch.float64).T + a.double() @ b.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=2e-2)
    for width in (1, 4):
        assert torch.equal(torch.cat([layer(part) for part in x.split(width)]), y)


@needs_kernels
def test_callers_do_not_disturb_each_other():
    """Only one caller has the worker threads; the others compute alone."""
    layer = int4_linear([affine(2000, 256, 64)], None, 64, torch.bfloat16, CPU)
    xs = [inputs(5, 256, seed) for seed in range(6)]
    wanted = [layer(x) for x in xs]
    wrong = []

    def work(index):
        wrong.extend(index for _ in range(60) if not torch.equal(layer(xs[index]), wanted[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Steps:
    """Both kinds of steps on one layer of one shape, and something to compute."""

    def __init__(self, folder, tokens, start):
        self.architecture = read_architecture(folder)
        self.native = operations_for(self.architecture, torch.bfloat16, CPU)
        self.eager = EagerOperations(self.architecture, torch.bfloat16)
        assert isinstance(self.native, NativeOperations)
        shapes, random = self.architecture, torch.Generator().manual_seed(4)
        heads, groups, width = shapes.num_heads, shapes.num_kv_heads, shapes.head_dim
        self.tokens, self.start = tokens, start
        self.qkv = torch.randn(tokens, (heads + 2 * groups) * width, generator=random).bfloat16()
        self.cache = torch.randn(2, groups, 64, width, generator=random).bfloat16()
        norms = [torch.rand(width, generator=random) + 0.5 if shapes.qk_norm else None for _ in "qk"]
        nothing = linear.DenseLinear(torch.empty(0), None)
        weight = torch.rand(shapes.hidden_size, generator=random) + 0.5
        self.layer = Layer(weight, nothing, norms[0], norms[1], nothing, weight, nothing, nothing)
        self.cos, self.sin = rope_tables(shapes, 64, CPU)

    def span(self, start, count):
        end = start + count
        mask = torch.ones(count, end, dtype=torch.bool).tril(start)
        shared = self.architecture.num_heads // self.architecture.num_kv_heads
        return Span(start, end, self.cos[start:end], self.sin[start:end], mask.repeat(shared, 1))

    def attend(self, steps, first=0, count=None, cache=None):
        count = self.tokens if count is None else count
        cache = self.cache.clone() if cache is None else cache
        rows = self.qkv[first : first + count]
        return steps.attend(self.layer, rows, cache, self.span(self.start + first, count)), cache


@pytest.fixture(params=[("qwen2", 32, 7), ("qwen3", 64, 3), ("llama", 96, 2)], ids=lambda value: value[0])
def steps(request, toy_folder):
    kind, width, heads_a_group = request.param
    options = {"num_heads": 2 * heads_a_group, "num_kv_heads": 2, "head_dim": width, "quantized": True}
    return Steps(toy_folder(model_type=kind, dtype="bfloat16", **options), tokens=9, start=20)


@needs_kernels
def test_attention_is_pytorchs(steps):
    (found, filled), (wanted, expected) = steps.attend(steps.native), steps.attend(steps.eager)
    assert torch.equal(filled[:, :, : steps.start], expected[:, :, : steps.start])
    torch.testing.assert_close(filled[:, :, :29], expected[:, :, :29], rtol=2**-7, atol=1e-2)
    assert torch.equal(filled[:, :, 29:], steps.cache[:, :, 29:])
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2e-2)


@needs_kernels
@pytest.mark.parametrize("width", [1, 2, 5])
def test_attentions_bits_do_not_depend_on_the_rows_beside_it(steps, width):
    together, filled = steps.attend(steps.native)
    cache = steps.cache.clone()
    parts = [
        steps.attend(steps.native, first, min(width, steps.tokens - first), cache)[0]
        for first in range(0, steps.tokens, width)
    ]
    assert torch.equal(torch.cat(parts), together)
    assert torch.equal(cache, filled)


@needs_kernels
@pytest.mark.parametrize("tokens", [2, 9, 16])
def test_without_them_a_round_of_sixteen_rows_attends_as_row_by_row(toy_folder, tokens):
    options = {"num_heads": 14, "num_kv_heads": 2, "head_dim": 32, "quantized": True}
    steps = Steps(toy_folder(model_type="qwen2", dtype="bfloat16", **options), tokens=tokens, start=20)
    together, _ = steps.attend(steps.eager)
    cache = steps.cache.clone()
    alone = [steps.attend(steps.eager, row, 1, cache)[0] for row in range(tokens)]
    assert torch.equal(torch.cat(alone), together)


def test_without_them_a_products_bits_do_not_depend_on_sixteen_rows(monkeypatch):
    monkeypatch.setattr(linear, "load_library", lambda _: None)
    layer, x = int4_linear([affine(400, 256, 64)], None, 64, torch.bfloat16, CPU), inputs(16, 256)
    assert isinstance(layer, linear.Int4Linear)
    together = layer(x)
    for width in range(1, 16):
        assert torch.equal(torch.cat([layer(part) for part in x.split(width)]), together)


@needs_kernels
def test_norms_and_gates_are_pytorchs(steps):
    width = steps.architecture.hidden_size
    x, added = inputs(5, width).float(), inputs(5, width, seed=6)
    mine, theirs = x.clone(), x.clone()
    for other in (None, added):
        found = steps.native.norm(mine, other, steps.layer.input_norm)
        wanted = steps.eager.norm(theirs, other, steps.layer.input_norm)
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-6)
        assert torch.equal(mine, theirs)
    gate_up = torch.cat((inputs(5, 64), torch.tensor([[-200.0, 200.0, 0.0, -88.5] * 16] * 5).bfloat16()), 1)
    for x in (gate_up, gate_up.roll(64, 1)):
        torch.testing.assert_close(steps.native.gate(x), steps.eager.gate(x), rtol=2**-6, atol=1e-6)


@needs_kernels
def test_a_model_computes_the_same_with_and_without_the_kernels(toy_folder, monkeypatch):
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "quantized": True, "dtype": "bfloat16"}
    folder, tokens = toy_folder(model_type="qwen2", **options), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    backend = open_backend("torch", device="cpu")
    fast = backend.load(folder, max_kv_cache_tokens=32)
    for module in (linear, operations):
        monkeypatch.setattr(module, "load_library", lambda _threads: None)
    plain = backend.load(folder, max_kv_cache_tokens=32)
    assert isinstance(fast.decoder.operations, NativeOperations)
    assert isinstance(plain.decoder.operations, EagerOperations)
    logits = [model.logits(model.new_cache(), tokens) for model in (fast, plain)]
    assert np.abs(logits[0] - logits[1]).mean() < 0.02 * np.abs(logits[1]).mean()


@needs_kernels
def test_a_models_logits_do_not_depend_on_how_many_tokens_it_reads_at_once(toy_folder):
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "quantized": True, "dtype": "bfloat16"}
    model = open_backend("torch", device="cpu").load(
        toy_folder(model_type="qwen3", **options), max_kv_cache_tokens=32
    )
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    together, cache = model.logits(model.new_cache(), tokens), model.new_cache()
    assert np.array_equal(np.concatenate([model.logits(cache, [token]) for token in tokens]), together)


@pytest.mark.parametrize("lack", ["switch", "compiler", "place", "processor", "working compiler"])
def test_without_kernels_pytorch_does_the_work(lack, monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path))
    if lack == "switch":
        monkeypatch.setenv(library.SWITCH, "0")
    elif lack == "compiler":
        monkeypatch.setattr(library, "COMPILERS", ("no-such-compiler",))
    elif lack == "place":
        (tmp_path / "file").write_text("", encoding="utf-8")
        monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "file"))
    elif lack == "working compiler":
        monkeypatch.setattr(library, "FLAGS", ("--no-such-flag",))
    else:
        monkeypatch.setattr(library, "NEEDED", frozenset({"a_flag_of_no_processor"}))
    assert library.load_library.__wrapped__(2) is None


def test_shapes_that_do_not_fill_registers_are_pytorchs(toy_folder):
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "quantized": True, "dtype": "bfloat16"}
    architecture = read_architecture(toy_folder(model_type="qwen2", **options))
    assert isinstance(operations_for(architecture, torch.bfloat16, CPU), EagerOperations)
    wide = replace(architecture, head_dim=32)
    assert isinstance(operations_for(wide, torch.float32, CPU), EagerOperations)
