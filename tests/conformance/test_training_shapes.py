"""Training at shapes that no small toy has: long texts, many rows, a large vocabulary, 16-bit bases.

Backends cut such work into pieces; a piece that is lost, counted twice or put in the wrong place shows here.
"""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from examples import (
    GREEDY,
    NUCLEUS,
    PLAIN,
    SPEC,
    ReferenceDraft,
    assert_slopes,
    gradients_of,
    one_of_each,
    open_trainer,
    random_example,
    random_lora,
)
from safetensors.numpy import load_file, save_file

from draftloop.backends.architecture import read_architecture
from draftloop.backends.training import Objective, TrainerSettings
from draftloop.types import Rules, Sampling

PLAN = TrainerSettings(Objective.LK_HYBRID, gradient_checkpointing=False, max_gradient_norm=1e9)
SMALL = {
    "vocab_size": 64,
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
}
LARGE_VOCABULARY = 20_000
RATE = 1e-3


@pytest.fixture
def stepped(backend, toy_folder):
    """`stepped(microbatches, plan, folder, spec)`: one step's result and gradients by tensor."""

    def run(microbatches, plan=PLAN, folder=None, spec=SPEC):
        folder = folder or toy_folder(**SMALL)
        lora = random_lora(read_architecture(folder), spec, gain=0.2)
        trainer = open_trainer(backend, folder, lora, plan)
        return trainer.step(microbatches, RATE), gradients_of(trainer.state().moments)

    return run


def assert_same_step(found, expected, tolerance=1e-3):
    """Loss and gradients; `tolerance` is over each gradient's own length."""
    assert found[0].loss == pytest.approx(expected[0].loss, rel=tolerance)
    assert list(found[1]) == list(expected[1])
    for name, gradient in found[1].items():
        off = np.linalg.norm(gradient - expected[1][name])
        assert off <= tolerance * np.linalg.norm(expected[1][name]), name


@pytest.fixture(scope="session")
def long_texts():
    """Four of some 300 tokens, with 20 to 140 rows."""
    rules = (PLAIN, GREEDY, NUCLEUS, PLAIN)
    return [
        random_example(rule, num_prompt_tokens=160 + i, num_rows=20 + 40 * i, vocab_size=64, seed=i)
        for i, rule in enumerate(rules)
    ]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (2,), (3,)], ids=str)
def test_long_microbatches_add_up(stepped, long_texts, cuts, checkpointing):
    plan = replace(PLAN, gradient_checkpointing=checkpointing)
    pieces = [long_texts[start:stop] for start, stop in zip((0, *cuts), (*cuts, 4), strict=True)]
    found, expected = stepped(pieces, plan), stepped([long_texts])
    assert found[0].rows == expected[0].rows == sum(one.num_rows for one in long_texts)
    assert_same_step(found, expected)


def test_long_texts_have_the_references_gradient(stepped, long_texts, toy_folder):
    batch = [long_texts[1], long_texts[3]]
    draft = ReferenceDraft.of(toy_folder(**SMALL))
    lora = random_lora(draft.architecture, gain=0.2)
    result, gradients = stepped([batch])
    assert result.loss == pytest.approx(draft.loss(lora, PLAN.objective, batch), rel=1e-3)
    assert_slopes(draft, lora, PLAN.objective, batch, gradients, 2e-3)


def test_long_texts_are_replayed_whole(backend, reference, toy_folder):
    """Masks end in the middle of the answer, behind the first piece."""
    folder, masked = toy_folder(**SMALL), tuple(range(0, 64, 2))
    batch = [
        random_example(rules, num_prompt_tokens=200, num_rows=rows, vocab_size=64, seed=rows)
        for rows in (150, 70)
        for rules in (
            Rules(Sampling(), masked, masked_rows=100),
            Rules(Sampling(temperature=0.8, top_p=0.9), masked, masked_rows=100),
        )
    ]
    lora = random_lora(read_architecture(folder), gain=0.2)
    trainer = open_trainer(backend, folder, lora, PLAN)
    model = reference.load(folder, max_kv_cache_tokens=8)
    model.set_adapter(lora, model.adapter_forms[0])
    for found, expected in zip(trainer.replay(batch), model.replay(batch), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.fixture(scope="session")
def wide_folder(toy_folder, tmp_path_factory):
    """`wide_folder(tied)`: 20,000 tokens, each with a row of its own in the head: a toy's padding is 0."""
    written = {}

    def write(*, tied):
        if tied in written:
            return written[tied]
        source = toy_folder(**{**SMALL, "vocab_size": LARGE_VOCABULARY, "tied": tied})
        tensors = load_file(source / "model.safetensors")
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        rows = np.random.default_rng(0).standard_normal(tensors[head].shape) * 2 / SMALL["hidden_size"] ** 0.5
        folder = written[tied] = tmp_path_factory.mktemp("wide")
        save_file({**tensors, head: rows.astype(np.float32)}, folder / "model.safetensors", {"format": "mlx"})
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        return folder

    return write


@pytest.fixture(scope="session")
def wide_example():
    """70 rows over the large vocabulary."""
    return random_example(PLAIN, num_prompt_tokens=5, num_rows=70, vocab_size=LARGE_VOCABULARY)


@pytest.mark.parametrize(
    ("tied", "objective"), [(False, Objective.LK_HYBRID), (True, Objective.CROSS_ENTROPY)]
)
def test_a_large_vocabulary_has_the_references_gradient(stepped, wide_folder, wide_example, tied, objective):
    spec, folder = replace(SPEC, target_modules=("v_proj", "down_proj")), wide_folder(tied=tied)
    draft = ReferenceDraft.of(folder)
    lora = random_lora(draft.architecture, spec, gain=0.2)
    result, gradients = stepped([[wide_example]], replace(PLAN, objective=objective), folder, spec)
    assert result.loss == pytest.approx(draft.loss(lora, objective, [wide_example]), rel=1e-3)
    assert_slopes(draft, lora, objective, [wide_example], gradients, 2e-3)


def test_copies_of_a_text_teach_what_it_teaches_once(stepped, wide_folder, wide_example):
    """One microbatch whose logits take 224 MB in float32: more than any backend has in memory at once."""
    folder = wide_folder(tied=False)
    found, expected = (stepped([[wide_example] * n], folder=folder) for n in (40, 1))
    assert found[0].rows == 2800
    assert_same_step(found, expected)


def test_rows_may_have_fewer_top_tokens(stepped, toy_folder):
    batch = [
        random_example(PLAIN, num_prompt_tokens=4, num_rows=6, vocab_size=64, num_top=n, seed=n)
        for n in (1, 32, 5)
    ]
    draft = ReferenceDraft.of(toy_folder(**SMALL))
    lora = random_lora(draft.architecture, gain=0.2)
    result, gradients = stepped([batch])
    assert result.loss == pytest.approx(draft.loss(lora, PLAN.objective, batch), rel=1e-3)
    assert_slopes(draft, lora, PLAN.objective, batch, gradients, 2e-3)


def test_a_text_without_an_answer_teaches_nothing(stepped):
    """And is no row of the mean."""
    some = [random_example(PLAIN, num_prompt_tokens=5, num_rows=n, vocab_size=64, seed=n) for n in (4, 0, 7)]
    found, expected = stepped([some[:2], some[2:]]), stepped([[some[0], some[2]]])
    assert found[0].rows == expected[0].rows == 11
    assert_same_step(found, expected)


def test_rows_and_tokens_are_counted(stepped):
    """The last token of a text is not read: nothing is predicted from it."""
    some = [random_example(PLAIN, num_prompt_tokens=5, num_rows=n, vocab_size=64, seed=n) for n in (4, 7)]
    result = stepped([some[:1], some[1:]])[0]
    assert (result.rows, result.tokens) == (11, 8 + 11)


@pytest.fixture
def twins(toy_folder, tmp_path):
    """`twins(**options)`: a 16-bit folder and one with the same weights in 32 bits."""

    def write(**options):
        coarse = toy_folder(dtype="bfloat16", **options)
        tensors = load_file(coarse / "model.safetensors")
        exact = {
            name: value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value
            for name, value in tensors.items()
        }
        save_file(exact, tmp_path / "model.safetensors", {"format": "mlx"})
        config = json.loads((coarse / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
        return coarse, tmp_path

    return write


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "packed"])
def test_16_bit_bases_give_nearly_the_gradient_of_32(
    stepped, twins, reference, load_pair, quantized, checkpointing
):
    """Most published drafts: bfloat16, and 4-bit weights with bfloat16 scales."""
    coarse, exact = twins(model_type="qwen2", quantized=quantized)
    batch = one_of_each(load_pair(reference).target)
    plan = replace(PLAN, objective=Objective.FORWARD_KL, gradient_checkpointing=checkpointing)
    found, expected = (stepped([batch], plan, folder) for folder in (coarse, exact))
    assert found[0].applied
    assert found[0].loss == pytest.approx(expected[0].loss, rel=0.02)
    for name, gradient in found[1].items():
        cosine = (gradient * expected[1][name]).sum() / (
            np.linalg.norm(gradient) * np.linalg.norm(expected[1][name])
        )
        assert cosine > 0.98, name
    assert found[0].gradient_norm == pytest.approx(expected[0].gradient_norm, rel=0.05)
