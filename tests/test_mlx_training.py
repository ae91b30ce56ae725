"""What only the MLX backend does when it learns: memory, threads, chunks of rows. The rest: conformance."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.core as mx

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec, new_lora
from draftloop.backends.mlx.backend import MlxBackend
from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.backends.numpy.objectives import loss_rows
from draftloop.backends.training import Example, Objective, TrainerSettings
from draftloop.errors import OutOfMemory
from draftloop.types import Rules, Sampling

SPEC = LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
PLAN = TrainerSettings(Objective.LK_HYBRID, gradient_checkpointing=False, max_gradient_norm=1e9)
SAMPLED = Rules(Sampling(temperature=0.8))


@pytest.fixture(scope="module")
def backend():
    return MlxBackend("cpu")


def lora_of(folder, gain=0.3, seed=0):
    """An adapter that changes something."""
    random = np.random.default_rng(seed)
    fresh = new_lora(read_architecture(folder), SPEC, seed)
    modules = {
        name: LoraModule(m.a, (gain * random.standard_normal(m.b.shape)).astype(np.float32))
        for name, m in fresh.modules.items()
    }
    return Lora(SPEC, modules)


def example(num_tokens, num_prompt_tokens, vocab_size=272, rules=SAMPLED, seed=0):
    """A random text, and random p of 32 tokens in each row."""
    random = np.random.default_rng(seed)
    rows = num_tokens - num_prompt_tokens
    probs = random.dirichlet(np.full(33, 0.3), rows).astype(np.float32)
    return Example(
        tokens=random.integers(0, vocab_size, num_tokens).astype(np.int32),
        num_prompt_tokens=num_prompt_tokens,
        top_ids=np.array([random.permutation(vocab_size)[:32] for _ in range(rows)], np.int32),
        top_probs=probs[:, :32],
        tail_probs=probs[:, 32],
        rules=rules,
    )


def peak_bytes(action, *arguments):
    """What it needed at its peak beyond what was there before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    action(*arguments)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("objective", Objective)
def test_many_rows_are_computed_a_few_at_a_time_and_equal_the_reference(backend, toy_folder, objective):
    folder, text = toy_folder(), example(150, 5)
    lora = lora_of(folder)
    found = backend.new_trainer(folder, lora, replace(PLAN, objective=objective)).step([[text]], 1e-4)
    model = NumpyBackend().load(folder, max_kv_cache_tokens=160)
    model.set_adapter(lora, AdapterForm.UNFUSED)
    logits = model.logits(model.new_cache(), text.tokens[:-1].tolist())[4:]
    assert found.rows == 145
    assert found.loss == pytest.approx(loss_rows(objective, logits, text).mean(), rel=1e-4)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.95)], ids=["greedy", "top-p"]
)
def test_masks_end_in_the_middle_of_a_later_chunk(backend, toy_folder, sampling):
    folder = toy_folder()
    rules = Rules(sampling, masked_ids=tuple(range(0, 272, 2)), masked_rows=100)
    text = example(150, 5, rules=rules)
    model, expected = (one.load(folder, max_kv_cache_tokens=160) for one in (backend, NumpyBackend()))
    # Greedy rows agree where the text is what the masked draft would say.
    likely = expected.logits(expected.new_cache(), text.tokens[:-1].tolist())[4:].copy()
    likely[:100, ::2] = -np.inf
    text = replace(text, tokens=np.append(text.tokens[:-1], likely[-1].argmax()).astype(np.int32))
    text = replace(text, top_ids=np.argsort(-likely, axis=1)[:, :32].astype(np.int32))
    np.testing.assert_allclose(model.replay([text])[0], expected.replay([text])[0], atol=1e-4)


def test_logits_take_no_more_memory_for_more_rows(backend, toy_folder):
    """Not even half of one [R, V] array of the rows that are more."""
    folder = toy_folder(vocab_size=16384, num_layers=1, hidden_size=32, num_heads=2)
    trainer = backend.new_trainer(folder, lora_of(folder), replace(PLAN, gradient_checkpointing=True))
    few, many = example(136, 8, 16384), example(328, 8, 16384)

    def step(text):
        assert trainer.step([[text]], 1e-4).applied

    for action in (step, lambda text: trainer.replay([text])):
        grown = peak_bytes(action, many) - peak_bytes(action, few)
        assert grown < (many.num_rows - few.num_rows) * 16384 * 4 / 2


def test_checkpointing_takes_less_memory(backend, toy_folder):
    folder, text = toy_folder(num_layers=8, model_type="qwen2"), example(200, 100)
    plain, frugal = (
        backend.new_trainer(folder, lora_of(folder), replace(PLAN, gradient_checkpointing=frugal))
        for frugal in (False, True)
    )
    needed, less = (peak_bytes(one.step, [[text]], 1e-4) for one in (plain, frugal))
    assert less < 0.4 * needed


def test_a_microbatch_needs_the_memory_of_its_longest_example(backend, toy_folder):
    folder, text = toy_folder(), example(120, 60)
    trainer = backend.new_trainer(folder, lora_of(folder), PLAN)
    alone = peak_bytes(trainer.step, [[text]], 1e-4)
    assert peak_bytes(trainer.step, [[text] * 8], 1e-4) < 2 * alone


def test_steps_leave_nothing_behind(backend, toy_folder):
    folder, text = toy_folder(), example(80, 40)
    trainer = backend.new_trainer(folder, lora_of(folder), PLAN)
    trainer.step([[text]], 1e-4)
    held = mx.get_active_memory()
    for _ in range(8):
        trainer.step([[text]], 1e-4)
        trainer.replay([text])
    # Scalars come and go; one layer's activations would be too much.
    assert mx.get_active_memory() < held + 79 * 64 * 4


def test_the_base_stays_packed(backend, toy_folder):
    """A trainer of a 4-bit folder holds what the served model does, its LoRA and Adam; nothing unpacked."""
    folder = toy_folder(quantized=True, hidden_size=128, intermediate_size=512)
    weight_bytes = backend.load(folder, max_kv_cache_tokens=8).weight_bytes
    lora = lora_of(folder)
    before = mx.get_active_memory()
    trainer = backend.new_trainer(folder, lora, PLAN)
    trainer.step([[example(40, 20)]], 1e-4)
    learnt = sum(m.a.nbytes + m.b.nbytes for m in lora.modules.values())
    # Weights, two moments, and the modules' own copies.
    assert mx.get_active_memory() - before <= weight_bytes + 4 * learnt + 100_000


def test_weight_bytes_count_what_an_adapter_adds(backend, toy_folder):
    model = backend.load(toy_folder(quantized=True), max_kv_cache_tokens=8)
    bare = model.weight_bytes
    lora = lora_of(toy_folder(quantized=True))
    shapes = [(m.b.shape[0], m.a.shape[1]) for m in lora.modules.values()]
    expected = {
        AdapterForm.UNFUSED: sum(SPEC.rank * (rows + columns) * 4 for rows, columns in shapes),
        AdapterForm.FUSED16: sum(rows * columns * 4 for rows, columns in shapes),
        AdapterForm.FUSED8: sum(rows * columns * 10 // 8 for rows, columns in shapes),
        AdapterForm.FUSED4: sum(rows * columns * 6 // 8 for rows, columns in shapes),
    }
    for form in model.adapter_forms:
        model.set_adapter(lora, form)
        assert model.weight_bytes - bare == expected[form], form
    model.set_adapter(None, AdapterForm.UNFUSED)
    assert model.weight_bytes == bare


def test_a_long_text_trains_in_half_precision(backend, toy_folder):
    """A sum over 210 rows stays inside what float16 can hold, and close to float32."""
    text = example(220, 10)
    exact, coarse = (
        backend.new_trainer(folder, lora_of(folder, gain=0.1), PLAN)
        for folder in (toy_folder(), toy_folder(dtype="float16"))
    )
    expected, found = (one.step([[text]], 1e-4) for one in (exact, coarse))
    assert found.applied
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    wanted, told = (one.state().moments for one in (exact, coarse))
    for name in wanted:
        if name.endswith(".m"):
            assert np.linalg.norm(told[name] - wanted[name]) < 0.1 * np.linalg.norm(wanted[name]), name


def test_training_in_one_thread_while_another_answers(backend, toy_folder):
    """Both compute what they would alone: to the bit."""
    folder, text = toy_folder(quantized=True), example(60, 20)
    model = backend.load(folder, max_kv_cache_tokens=64)
    tokens = text.tokens[:40].tolist()
    alone = model.logits(model.new_cache(), tokens)
    trainers = [
        backend.new_trainer(folder, lora_of(folder), replace(PLAN, gradient_checkpointing=True))
        for _ in range(2)
    ]
    for _ in range(3):
        trainers[0].step([[text]], 1e-3)
    learning = threading.Thread(target=lambda: [trainers[1].step([[text]], 1e-3) for _ in range(3)])
    learning.start()
    answered = 0
    while learning.is_alive() or not answered:
        np.testing.assert_array_equal(model.logits(model.new_cache(), tokens), alone)
        answered += 1
    learning.join()
    expected, found = (one.state() for one in trainers)
    assert found.steps == 3
    for name, module in expected.lora.modules.items():
        np.testing.assert_array_equal(found.lora.modules[name].a, module.a)
        np.testing.assert_array_equal(found.lora.modules[name].b, module.b)


def refusing(message):
    """An evaluation that fails as MLX's own does."""

    def fail(*_):
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize(
    "message",
    [
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer …",
        "[malloc_or_wait] Unable to allocate 9 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU…ErrorOutOfMemory)",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
    ],
)
def test_running_out_of_memory_names_the_settings(backend, toy_folder, monkeypatch, message):
    folder, text = toy_folder(), example(20, 10)
    trainer = backend.new_trainer(folder, lora_of(folder), PLAN)
    model = backend.load(folder, max_kv_cache_tokens=32)
    before = trainer.state()
    with monkeypatch.context() as faults:
        faults.setattr(mx, "eval", refusing(message))
        with pytest.raises(OutOfMemory) as caught:
            trainer.step([[text]], 1e-3)
        for setting in ("batch_size", "max_sequence_length", "gradient_checkpointing"):
            assert setting in caught.value.remedy
        with pytest.raises(OutOfMemory, match="max_kv_cache_tokens"):
            model.replay([text])
        with pytest.raises(OutOfMemory):
            model.set_adapter(lora_of(folder), AdapterForm.UNFUSED)
    # Nothing has changed, and it goes on.
    after = trainer.state()
    assert after.steps == 0
    for name, module in before.lora.modules.items():
        np.testing.assert_array_equal(after.lora.modules[name].b, module.b)
    assert trainer.step([[text]], 1e-3).applied
    assert model.weight_bytes == backend.load(folder, max_kv_cache_tokens=32).weight_bytes


def test_other_errors_are_not_told_as_memory(backend, toy_folder, monkeypatch):
    folder = toy_folder()
    trainer = backend.new_trainer(folder, lora_of(folder), PLAN)
    monkeypatch.setattr(mx, "eval", refusing("[matmul] Last dimension of first input must match"))
    with pytest.raises(RuntimeError, match="matmul"):
        trainer.step([[example(20, 10)]], 1e-3)


def test_a_step_pauses_between_layers(backend, toy_folder):
    folder, pauses = toy_folder(num_layers=3), []
    plan = replace(PLAN, pause=lambda: pauses.append(1))
    trainer = backend.new_trainer(folder, lora_of(folder), plan)
    trainer.step([[example(24, 10), example(20, 8)]], 1e-4)
    assert len(pauses) == 2 * 3
    trainer.replay([example(24, 10)])
    assert len(pauses) == 2 * 3 + 1
