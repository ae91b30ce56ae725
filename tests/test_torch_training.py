"""What only the PyTorch backend does when it learns: packing, chunks, memory, bits. The rest: conformance."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec, new_lora
from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.backends.numpy.objectives import loss_rows
from draftloop.backends.torch import attention, frozen, objectives, packing, training
from draftloop.backends.torch.backend import TorchBackend
from draftloop.backends.training import Example, Objective, TrainerSettings
from draftloop.errors import OutOfMemory
from draftloop.types import Rules, Sampling

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPEC = LoraSpec(rank=4, alpha=8.0, target_modules=ALL_MODULES)
PLAN = TrainerSettings(Objective.LK_HYBRID, gradient_checkpointing=False, max_gradient_norm=1e9)
REAL = {"model_type": "qwen2", "quantized": True, "dtype": "bfloat16", "tied": True}
"""As the package's draft is stored."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lora_of(folder, gain=0.1, seed=0):
    """An adapter that changes something."""
    random = np.random.default_rng(seed)
    fresh = new_lora(read_architecture(folder), SPEC, seed)
    modules = {
        name: LoraModule(m.a, (gain * random.standard_normal(m.b.shape)).astype(np.float32))
        for name, m in fresh.modules.items()
    }
    return Lora(SPEC, modules)


def example(num_tokens, num_prompt_tokens, vocab_size=272, temperature=0.8, seed=0):
    """A random text, and random p of 32 tokens in each row."""
    random = np.random.default_rng(seed)
    rows = num_tokens - num_prompt_tokens
    probs = random.dirichlet(np.full(33, 0.3), rows).astype(np.float32)
    ids = [random.permutation(vocab_size)[:32] for _ in range(rows)]
    return Example(
        tokens=random.integers(0, vocab_size, num_tokens).astype(np.int32),
        num_prompt_tokens=num_prompt_tokens,
        top_ids=np.array(ids, np.int32).reshape(rows, 32),
        top_probs=probs[:, :32],
        tail_probs=probs[:, 32],
        rules=Rules(Sampling(temperature=temperature)),
    )


BATCH = [example(40, 11), example(23, 1, seed=1, temperature=0.0), example(60, 50, seed=2, temperature=1.0)]


def trainer(folder, **changes):
    return TorchBackend("cpu").new_trainer(folder, lora_of(folder), replace(PLAN, **changes))


def gradients(one, microbatches):
    """Of each matrix; the first moment of the first step is a tenth of it."""
    result = one.step(microbatches, 1e-4)
    assert result.applied
    return result.loss, {n: 10 * a for n, a in one.state().moments.items() if n.endswith(".m")}


def assert_same(found, expected, relative):
    assert found[0] == pytest.approx(expected[0], rel=relative)
    assert list(found[1]) == list(expected[1])
    for name, array in expected[1].items():
        allowed = relative * np.abs(array).max()
        np.testing.assert_allclose(found[1][name], array, rtol=0, atol=allowed, err_msg=name)


@pytest.mark.parametrize("objective", Objective)
def test_rows_in_chunks_and_the_head_in_blocks_change_nothing(toy_folder, monkeypatch, objective):
    folder = toy_folder(**{**REAL, "dtype": "float32"})
    expected = gradients(trainer(folder, objective=objective), [BATCH])
    monkeypatch.setattr(objectives, "_LOGIT_BYTES", {"cpu": 7 * 4 * 320})
    monkeypatch.setattr(objectives, "_BLOCK_COLUMNS", 50)
    monkeypatch.setattr(frozen, "_HEAD_ROWS", 64)
    one = trainer(folder, objective=objective)
    alphas = one.replay(BATCH)
    assert_same(gradients(one, [BATCH]), expected, 1e-4)
    monkeypatch.undo()
    for found, wanted in zip(alphas, trainer(folder).replay(BATCH), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_microbatches_add_up_where_each_is_read_by_itself(toy_folder, monkeypatch):
    folder = toy_folder(model_type="qwen3")
    expected = gradients(trainer(folder), [BATCH])
    monkeypatch.setattr(training, "_PACKED_TOKENS", {"cpu": 0})
    read = []
    accumulate = training.TorchTrainer._accumulate
    monkeypatch.setattr(
        training.TorchTrainer,
        "_accumulate",
        lambda self, pack, rows: read.append(len(pack)) or accumulate(self, pack, rows),
    )
    assert_same(gradients(trainer(folder), [BATCH[:2], BATCH[2:]]), expected, 1e-4)
    assert read == [2, 1]


def test_packed_texts_are_never_larger_than_allowed(toy_folder, monkeypatch):
    monkeypatch.setattr(training, "_PACKED_TOKENS", {"cpu": 100})
    one, read = trainer(toy_folder()), []
    monkeypatch.setattr(one, "_accumulate", lambda pack, _: read.append(pack) or torch.zeros(()))
    one.step([[text] for text in (*BATCH, *BATCH)], 1e-4)
    assert [sum(len(text.tokens) for text in pack) for pack in read] == [63, 100, 83]
    assert [text for pack in read for text in pack] == [*BATCH, *BATCH]


def beginning_with(prompt, one):
    """The same text behind another beginning."""
    tokens = np.concatenate((prompt, one.tokens)).astype(np.int32)
    return replace(one, tokens=tokens, num_prompt_tokens=len(prompt) + one.num_prompt_tokens)


ALIKE = [beginning_with(np.arange(30) * seed, text) for seed in (1, 3) for text in BATCH]
"""Two system prompts with three questions each; the second question has a prompt of one token alone."""


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_texts_begin_with_alike_is_read_once_and_learns_from_all(
    toy_folder, monkeypatch, checkpointing, short
):
    folder = toy_folder(model_type="qwen3")
    order = [ALIKE[index] for index in (0, 3, 1, 4, 2, 5)]
    one = trainer(folder, gradient_checkpointing=checkpointing)
    if not short:
        monkeypatch.setattr(attention, "_SHORT_TOKENS", 0)
    alphas, found = one.replay(order), gradients(one, [order])
    assert packing.packed_tokens(order) == sum(len(text.tokens) - 1 for text in order) - 4 * 30
    monkeypatch.setattr(packing, "LEAST_SHARED_TOKENS", 1000)
    assert packing.packed_tokens(order) == sum(len(text.tokens) - 1 for text in order)
    apart = trainer(folder, gradient_checkpointing=checkpointing)
    for shared, wanted in zip(alphas, apart.replay(order), strict=True):
        np.testing.assert_allclose(shared, wanted, atol=1e-5)
    assert_same(found, gradients(apart, [order]), 1e-4)


def test_a_text_that_shares_little_or_nothing_does_not_keep_the_others_from_sharing(toy_folder):
    """Three texts with one long beginning, one that leaves it early, one with hardly a prompt."""
    system, other = np.arange(60) * 3, np.arange(60) * 5
    other[:20] = system[:20]
    long, far = [beginning_with(system, text) for text in BATCH], beginning_with(other, BATCH[0])
    short = replace(example(60, 5, seed=3), tokens=long[1].tokens[:60])
    alone = sum(len(text.tokens) - 1 for text in (*long, far, short))
    order = [long[0], far, long[1], short, long[2]]
    assert packing.packed_tokens(order) == alone - 2 * 60
    one = trainer(toy_folder())
    for text, packed in zip(order, one.replay(order), strict=True):
        np.testing.assert_allclose(packed, one.replay([text])[0], atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=5))
def test_no_division_of_neighbours_lays_out_fewer_tokens(branches):
    """Texts of blocks that are alike or not, in the order of their tokens, against every way to cut that."""
    beginnings = sorted(np.repeat([*blocks, 7], packing.LEAST_SHARED_TOKENS).tolist() for blocks in branches)
    texts = [
        replace(example(2, 1), tokens=np.array([*tokens, 1, 1], np.int32), num_prompt_tokens=len(tokens) + 1)
        for tokens in beginnings
    ]

    def saved(group):
        common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*group, strict=False)))
        return (len(group) - 1) * common if common >= packing.LEAST_SHARED_TOKENS else 0

    most = 0
    for cuts in product([False, True], repeat=len(texts) - 1):
        stops = [i for i, cut in enumerate([*cuts, True], start=1) if cut]
        most = max(most, sum(saved(beginnings[a:b]) for a, b in pairwise([0, *stops])))
    assert packing.packed_tokens(texts) == sum(len(text.tokens) - 1 for text in texts) - most


def test_a_text_that_is_there_twice_shares_its_prompt_alone(toy_folder):
    text = example(60, 40)
    assert packing.packed_tokens([text, text]) == 2 * 59 - 39
    one = trainer(toy_folder())
    (alone,), pair = one.replay([text]), one.replay([text, text])
    for alphas in pair:
        np.testing.assert_allclose(alphas, alone, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1}, {"model_type": "qwen3", "head_dim": 32}], ids=str
)
def test_both_kinds_of_attention_agree(toy_folder, monkeypatch, options):
    """Short texts by whole matrices, long ones by PyTorch's fused kernel: two ways to one gradient."""
    folder = toy_folder(**options)
    short = gradients(trainer(folder), [BATCH])
    monkeypatch.setattr(attention, "_SHORT_TOKENS", 0)
    assert_same(gradients(trainer(folder), [BATCH]), short, 1e-4)


def test_long_texts_have_the_references_loss(toy_folder):
    folder, text = toy_folder(), example(700, 600)
    found = trainer(folder, gradient_checkpointing=True).step([[text]], 1e-4)
    model = NumpyBackend().load(folder, max_kv_cache_tokens=700)
    model.set_adapter(lora_of(folder), AdapterForm.UNFUSED)
    logits = model.logits(model.new_cache(), text.tokens[:-1].tolist())[599:]
    assert found.loss == pytest.approx(loss_rows(PLAN.objective, logits, text).mean(), rel=1e-4)


def test_bfloat16_gradients_point_where_float32_ones_do(toy_folder):
    exact = gradients(trainer(toy_folder(**{**REAL, "dtype": "float32"})), [BATCH])[1]
    coarse = gradients(trainer(toy_folder(**REAL)), [BATCH])[1]
    found, wanted = (np.concatenate([a.ravel() for a in one.values()]) for one in (coarse, exact))
    assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.98
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(wanted), rel=0.1)


def test_the_base_does_not_change(toy_folder):
    folder = toy_folder(**REAL)
    before = (folder / "model.safetensors").read_bytes()
    one = trainer(folder, gradient_checkpointing=True)
    alphas, state = one.replay(BATCH), one.state()
    for _ in range(3):
        one.step([BATCH], 1e-2)
    one.restore(state)
    for found, wanted in zip(one.replay(BATCH), alphas, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_restored_run_goes_on_to_the_bit(toy_folder, checkpointing):
    folder = toy_folder(**REAL)
    whole, resumed = (trainer(folder, gradient_checkpointing=checkpointing) for _ in range(2))
    whole.step([BATCH], 1e-3)
    resumed.restore(whole.state())
    for turn in range(3):
        batch = [BATCH[turn:], BATCH[:turn]]
        assert whole.step(batch, 1e-3) == resumed.step(batch, 1e-3)
    one, other = whole.state(), resumed.state()
    assert one.steps == other.steps == 4
    for name, module in one.lora.modules.items():
        np.testing.assert_array_equal(module.a, other.lora.modules[name].a)
        np.testing.assert_array_equal(module.b, other.lora.modules[name].b)
    for name, array in one.moments.items():
        np.testing.assert_array_equal(array, other.moments[name])


def kept_for_backward(one, batch):
    """Every tensor that a step keeps, when its forward pass through the layers is done, and in all."""
    kept, loss, after_forward = [], one._loss, []

    def head_loss(*arguments):
        after_forward.extend(kept)
        return loss(*arguments)

    one._loss = head_loss
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one.step([batch], 1e-4)
    return after_forward, kept


def test_checkpointing_keeps_a_fraction(toy_folder):
    folder, sizes = toy_folder(**REAL), []
    for checkpointing in (False, True):
        tensors = kept_for_backward(trainer(folder, gradient_checkpointing=checkpointing), BATCH)[0]
        sizes.append(
            sum(storage.nbytes() for storage in {t.data_ptr(): t.untyped_storage() for t in tensors}.values())
        )
    assert sizes[1] < sizes[0] / 2.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_dense_weight_and_no_logits_are_kept(toy_folder, checkpointing):
    """Of a frozen matrix neither a dense copy nor a gradient; of the output head nothing at all."""
    folder = toy_folder(**REAL)
    shapes = set(read_architecture(folder).linear_shapes.values())
    kept = kept_for_backward(trainer(folder, gradient_checkpointing=checkpointing), BATCH)[1]
    assert kept
    for tensor in kept:
        assert tuple(tensor.shape) not in shapes
        assert 272 not in tensor.shape


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] can't allocate memory: you tried 9 bytes"), MemoryError()]
)
def test_out_of_memory_names_the_settings_to_lower(toy_folder, monkeypatch, error):
    one = trainer(toy_folder())
    before = one.state()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(one._learner, "hidden", fail)
    for act in (lambda: one.step([BATCH], 1e-3), lambda: one.replay(BATCH)):
        with pytest.raises(OutOfMemory) as caught:
            act()
        for setting in ("batch_size", "max_sequence_length", "gradient_checkpointing"):
            assert setting in caught.value.remedy
    assert one.state().steps == before.steps


def test_another_error_stays_what_it_is(toy_folder, monkeypatch):
    one = trainer(toy_folder())

    def fail(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(one._learner, "hidden", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        one.step([BATCH], 1e-3)


def test_a_state_of_another_adapter_is_refused(toy_folder):
    folder = toy_folder()
    narrow = LoraSpec(2, 4.0, ("v_proj",))
    other = TorchBackend("cpu").new_trainer(folder, new_lora(read_architecture(folder), narrow, 0), PLAN)
    one = trainer(folder)
    before = one.state()
    with pytest.raises(ValueError, match="other modules or shapes"):
        one.restore(other.state())
    np.testing.assert_array_equal(
        one.state().lora.modules["model.layers.0.mlp.up_proj"].b,
        before.lora.modules["model.layers.0.mlp.up_proj"].b,
    )


def test_float16_checkpoints_learn_in_a_wider_range(toy_folder):
    result = trainer(toy_folder(dtype="float16")).step([BATCH], 1e-3)
    assert result.applied
    assert np.isfinite(result.loss)


def test_examples_without_rows_are_passed_over(toy_folder):
    one, other = trainer(toy_folder()), trainer(toy_folder())
    empty = example(1, 1)
    expected, found = one.step([BATCH], 1e-3), other.step([[empty], [*BATCH, empty]], 1e-3)
    assert (found.loss, found.rows) == (expected.loss, expected.rows)
    measured = other.replay([empty, *BATCH])
    assert [len(alphas) for alphas in measured] == [0, *(text.num_rows for text in BATCH)]
    model = TorchBackend("cpu").load(toy_folder(), max_kv_cache_tokens=64)
    assert [len(alphas) for alphas in model.replay([empty, *BATCH])] == [0, 29, 22, 10]


def test_a_step_of_nothing_is_not_applied(toy_folder):
    one = trainer(toy_folder())
    result = one.step([[example(9, 9)]], 1e-3)
    assert (result.applied, result.rows) == (False, 0)
    assert one.state().steps == 0


def test_texts_longer_than_the_cache_can_be_replayed(toy_folder):
    """A request fits the target's cache; the draft's may be shorter, and several chunks make a text."""
    folder, text = toy_folder(), example(1100, 480)
    model = TorchBackend("cpu").load(folder, max_kv_cache_tokens=64)
    expected = NumpyBackend().load(folder, max_kv_cache_tokens=64).replay([text])[0]
    np.testing.assert_allclose(model.replay([text])[0], expected, atol=1e-4)
    np.testing.assert_allclose(trainer_of_nothing(folder).replay([text])[0], expected, atol=1e-4)


def trainer_of_nothing(folder):
    """With an adapter that changes nothing yet."""
    return TorchBackend("cpu").new_trainer(folder, new_lora(read_architecture(folder), SPEC, 0), PLAN)
