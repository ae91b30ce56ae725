"""What a loaded model computes: logits, the cache's arithmetic, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest

from draftloop.backends.base import PrefillJob
from draftloop.errors import ModelUnreadable

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = tuple(np.random.default_rng(7).integers(0, 267, 96).tolist())
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = [
    *({"model_type": name} for name in MODEL_TYPES),
    *({"model_type": name, "tied": True} for name in MODEL_TYPES),
    {"model_type": "qwen3", "head_dim": 32},
    {"model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"model_type": "llama", "num_kv_heads": 4},
    {"model_type": "llama", "num_kv_heads": 1},
]


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= tolerance


def in_bfloat16(backend):
    return backend.capabilities().backend == "torch" and on_gpu(backend)


def on_gpu(backend):
    return not backend.capabilities().device.startswith("cpu")


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values()))[:40])
def test_dense_logits_equal_the_references(backend, reference, load_toy, options):
    model, expected = load_toy(backend, **options), load_toy(reference, **options)
    assert_close(model.logits(model.new_cache(), TOKENS), expected.logits(expected.new_cache(), TOKENS), 1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_quantized_logits_equal_the_references(backend, reference, load_toy, model_type, tied):
    options = {"model_type": model_type, "tied": tied, "quantized": True}
    model, expected = load_toy(backend, **options), load_toy(reference, **options)
    found = model.logits(model.new_cache(), TOKENS)
    # On CUDA 4-bit weights are multiplied as bfloat16, whatever the folder holds.
    tolerance = 0.6 if in_bfloat16(backend) else 1e-2
    assert_close(found, expected.logits(expected.new_cache(), TOKENS), tolerance)


def test_bfloat16_weights_are_read(backend, reference, load_toy):
    model, expected = (load_toy(b, dtype="bfloat16") for b in (backend, reference))
    found = model.logits(model.new_cache(), TOKENS)
    wanted = expected.logits(expected.new_cache(), TOKENS)
    # The reference computes in float32, the others in bfloat16: three digits of what they add up.
    assert np.abs(found - wanted).mean() < 0.15
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.998


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (40,), (33, 65), tuple(range(1, 96))])
def test_reading_in_pieces_equals_reading_at_once(backend, load_toy, quantized, cuts):
    model = load_toy(backend, quantized=quantized)
    whole = model.logits(model.new_cache(), TOKENS)
    cache = model.new_cache()
    pieces = []
    for start, stop in zip((0, *cuts), (*cuts, len(TOKENS)), strict=True):
        pieces.append(model.logits(cache, TOKENS[start:stop]))
        assert cache.position == stop
    tolerance = 0.5 if in_bfloat16(backend) else 1e-2
    assert_close(np.concatenate(pieces), whole, tolerance if quantized else 1e-3)


def test_prefill_reads_like_logits(backend, load_toy):
    model = load_toy(backend)
    whole = model.logits(model.new_cache(), TOKENS)
    caches = [model.new_cache() for _ in range(3)]
    model.prefill([PrefillJob(cache, TOKENS[: 10 * i]) for i, cache in enumerate(caches, 1)])
    model.prefill([PrefillJob(cache, TOKENS[10 * i : 60]) for i, cache in enumerate(caches, 1)])
    for cache in caches:
        assert cache.position == 60
        assert_close(model.logits(cache, TOKENS[60:]), whole[60:], 1e-3)


@pytest.mark.parametrize("trimmed", [1, 5, 63, 64])
def test_trimmed_tokens_are_forgotten(backend, load_toy, trimmed):
    model = load_toy(backend)
    whole = model.logits(model.new_cache(), TOKENS)
    cache = model.new_cache()
    model.logits(cache, (*TOKENS[: 64 - trimmed], *[5] * trimmed))
    cache.trim(trimmed)
    assert cache.position == 64 - trimmed
    assert_close(model.logits(cache, TOKENS[64 - trimmed :]), whole[64 - trimmed :], 1e-3)


def test_trim_of_nothing_changes_nothing(backend, load_toy):
    model = load_toy(backend)
    whole = model.logits(model.new_cache(), TOKENS)
    cache = model.new_cache()
    cache.trim(0)
    model.logits(cache, TOKENS[:20])
    cache.trim(0)
    assert_close(model.logits(cache, TOKENS[20:]), whole[20:], 1e-3)


@pytest.mark.parametrize("n", [-1, 11])
def test_trim_refuses_more_than_there_is(backend, load_toy, n):
    model = load_toy(backend)
    cache = model.new_cache()
    model.logits(cache, TOKENS[:10])
    with pytest.raises(ValueError, match="trim"):
        cache.trim(n)
    assert cache.position == 10


def test_caches_do_not_interact(backend, load_toy):
    model = load_toy(backend)
    mine, other = model.new_cache(), model.new_cache()
    alone = model.logits(model.new_cache(), TOKENS)
    first = model.logits(mine, TOKENS[:30])
    model.logits(other, TOKENS[::-1])
    other.trim(50)
    second = model.logits(mine, TOKENS[30:])
    assert_close(np.concatenate([first, second]), alone, 1e-3)


def test_the_cap_is_honoured(backend, load_toy):
    model = load_toy(backend)
    cache = model.new_cache()
    assert (cache.position, cache.max_tokens) == (0, 128)
    model.logits(cache, [3] * 127)
    with pytest.raises(ValueError, match="128"):
        model.logits(cache, [3, 3])
    assert cache.position == 127
    model.logits(cache, [3])
    assert cache.position == 128
    with pytest.raises(ValueError, match="128"):
        model.prefill([PrefillJob(cache, [3])])
    cache.trim(1)
    model.logits(cache, [3])


def test_padding_ids_of_the_other_model_can_be_read(backend, load_toy):
    """Target and draft may differ in padding: the wider one's last ids mean nothing to the other."""
    model = load_toy(backend, vocab_size=272)
    cache = model.new_cache()
    logits = model.logits(cache, [5, 400, 6])
    assert logits.shape == (3, 272)
    assert np.isfinite(logits).all()
    # A position's logits never depend on what comes later.
    assert_close(logits[:1], model.logits(model.new_cache(), [5]), 1e-3)


def test_a_model_works_in_another_thread_than_the_loaders(backend, load_toy):
    model = load_toy(backend, model_type="llama", rope_scaling=LLAMA3_ROPE)
    found = []
    thread = threading.Thread(target=lambda: found.append(model.logits(model.new_cache(), TOKENS)))
    thread.start()
    thread.join()
    assert_close(found[0], model.logits(model.new_cache(), TOKENS), 1e-3)


def test_weight_bytes_shrink_with_quantization(backend, load_toy):
    dense, packed = load_toy(backend), load_toy(backend, quantized=True)
    count = sum(a * b for a, b in dense.architecture.linear_shapes.values()) * 2 + 2 * 272 * 64
    assert count * 4 <= dense.weight_bytes < count * 4 * 1.02
    if backend.capabilities().quantized_bits:
        assert packed.weight_bytes < dense.weight_bytes / 2


def test_capabilities_are_told(backend):
    told = backend.capabilities()
    assert told.backend in {"numpy", "torch", "mlx"}
    assert told.version[0].isdigit()
    assert "float32" in told.dtypes
    if told.device.startswith("cpu"):
        assert told.device_memory_bytes is None
    backend.clear_cache()


@pytest.fixture
def copied_folder(toy_folder, tmp_path):
    return shutil.copytree(toy_folder(model_type="qwen2"), tmp_path / "model")


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _cut_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _garble(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 4096)


def _remove(folder):
    (folder / "model.safetensors").unlink()


def _configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


FAULTS = {
    "truncated": _truncate,
    "header cut": _cut_header,
    "garbled": _garble,
    "no weights": _remove,
    "another shape": lambda folder: _configure(folder, hidden_size=128, head_dim=32),
    "a layer too many": lambda folder: _configure(folder, num_hidden_layers=3),
    "another type": lambda folder: _configure(folder, model_type="gpt2"),
    "no config": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders_are_refused(backend, copied_folder, fault):
    FAULTS[fault](copied_folder)
    with pytest.raises(ModelUnreadable) as caught:
        backend.load(copied_folder, max_kv_cache_tokens=64)
    assert caught.value.remedy.endswith(".")
