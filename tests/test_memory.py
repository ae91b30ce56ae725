"""The memory plan: arithmetic, what it refuses, and what it advises."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.backends.architecture import Architecture, Quantization
from draftloop.config import Config, load_config
from draftloop.errors import MemoryPlanError
from draftloop.loading import suffix_tokens
from draftloop.models.memory import (
    PREFILL_TOKENS,
    RUNTIME_BYTES,
    MemoryPlan,
    available_memory_bytes,
    kv_cache_bytes,
    lora_parameters,
    plan_memory,
    render,
    weight_bytes,
)
from draftloop.models.memory_advice import GIB
from draftloop.speculation.stream import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

DRAFT = Architecture(
    model_type="qwen2",
    vocab_size=151_936,
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=4864,
    max_position_tokens=32_768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tied_embeddings=True,
    attention_bias=True,
    qk_norm=False,
    quantization=None,
    dtype="bfloat16",
    eos_token_ids=(),
)
"""Qwen2.5-0.5B: 494,032,768 parameters by its model card."""

TARGET = replace(DRAFT, hidden_size=2048, num_layers=36, num_heads=16, head_dim=128, intermediate_size=11_008)
"""Qwen2.5-3B: 3,085,938,688 parameters."""


@pytest.fixture(autouse=True)
def _no_config_file(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.getbasetemp())


def plan(*overrides: str, available_bytes: int = 64 * GIB) -> MemoryPlan:
    config = load_config([], overrides).config
    return plan_memory(TARGET, DRAFT, config, available_bytes, num_suffix_tokens=suffix_tokens(config))


def part(memory_plan: MemoryPlan, label: str) -> int:
    (found,) = [p.num_bytes for p in memory_plan.parts if p.label.startswith(label)]
    return found


def test_so_many_answers_are_made_together_as_their_caches_fit():
    config = load_config([], ["memory.answers_at_once=8"]).config
    plan = plan_memory(TARGET, DRAFT, config, 64 * GIB, num_suffix_tokens=0)
    caches = kv_cache_bytes(TARGET, 4096) + kv_cache_bytes(DRAFT, 4096)
    assert caches < plan.answer_bytes < 1.2 * caches
    assert plan.answers_at_once(8) == 8
    tight = replace(plan, available_bytes=plan.generation_bytes + 2 * plan.answer_bytes)
    assert tight.answers_at_once(8) == 3
    assert tight.answers_at_once(2) == 2
    assert replace(plan, available_bytes=0).answers_at_once(8) == 1


def test_weights_are_the_model_cards_parameters() -> None:
    assert weight_bytes(DRAFT) == 2 * 494_032_768
    assert weight_bytes(TARGET) == 2 * 3_085_938_688
    assert weight_bytes(replace(DRAFT, dtype="float32")) == 4 * 494_032_768
    untied = weight_bytes(replace(DRAFT, tied_embeddings=False)) - weight_bytes(DRAFT)
    assert untied == 2 * 151_936 * 896


def test_quantized_weights_count_their_scales() -> None:
    dense = weight_bytes(DRAFT)
    for group_size, bits in ((32, 5.0), (64, 4.5), (128, 4.25)):
        packed = weight_bytes(replace(DRAFT, quantization=Quantization(group_size, 4)))
        assert packed == pytest.approx(dense * bits / 16, rel=1e-3)


def test_a_cache_is_two_bytes_for_each_key_and_value() -> None:
    assert kv_cache_bytes(DRAFT, 4096) == 2 * (2 * 24 * 2 * 64) * 4096
    assert part(plan("models.draft.max_kv_cache_tokens=100"), "draft: KV") == kv_cache_bytes(DRAFT, 100)
    assert part(plan("models.target.max_kv_cache_tokens=100"), "target: KV") == kv_cache_bytes(TARGET, 100)


def test_lora_parameters_and_their_sixteen_bytes() -> None:
    expected = 24 * 8 * ((896 + 896) + (128 + 896))
    assert lora_parameters(DRAFT, 8, ("q_proj", "v_proj")) == expected
    assert part(plan(), "LoRA") == 16 * expected


def test_the_totals_are_the_sums_of_their_parts() -> None:
    p = plan()
    target = part(p, "target: weights") + part(p, "target: KV")
    assert p.training_bytes < p.combined_bytes - target
    shared = part(p, "draft: weights") + RUNTIME_BYTES
    assert p.combined_bytes == sum(q.num_bytes for q in p.parts) + shared
    assert p.combined_bytes == p.generation_bytes + p.training_bytes


@given(
    st.sampled_from(
        [
            ("training.lora.rank=16", "LoRA"),
            ("training.lora.target_modules=[q_proj,v_proj,o_proj]", "LoRA"),
            ("training.batch_size=2", "training: activations"),
            ("training.batch_size=2", "training: logits"),
            ("training.max_sequence_length=4096", "training: activations"),
            ("memory.gradient_checkpointing=false", "training: activations"),
            ("generation.max_tokens=1024", "training: logits"),
            ("speculative.num_draft_tokens=64", "activations and logits"),
            ("models.target.max_kv_cache_tokens=16384", "activations and logits"),
            ("models.draft.max_kv_cache_tokens=16384", "activations and logits"),
            ("memory.prefix_cache_megabytes=512", "prefix cache"),
        ]
    )
)
def test_each_setting_acts_on_its_part(change: tuple[str, str]) -> None:
    override, label = change
    assert part(plan(override), label) > part(plan(), label)


def test_a_response_is_no_longer_than_the_sequence() -> None:
    short = plan("training.max_sequence_length=128")
    assert part(short, "training: logits") == 3 * 4 * 151_936 * 128


def test_checkpointing_saves_about_what_the_guide_says_or_more() -> None:
    with_it, without = (
        part(plan(f"memory.gradient_checkpointing={x}"), "training: act") for x in ("true", "false")
    )
    assert with_it < without / 2


def test_prompts_are_read_in_the_pieces_that_the_plan_counts() -> None:
    assert PREFILL_TOKENS == PREFILL_CHUNK_TOKENS


def test_what_fits_passes_and_one_byte_less_does_not() -> None:
    for work in ("generation", "training", "combined"):
        total, check = f"{work}_bytes", f"check_{work}"
        needed = getattr(plan(), total)
        getattr(plan(available_bytes=needed), check)()
        with pytest.raises(MemoryPlanError) as caught:
            getattr(plan(available_bytes=needed - 1), check)()
        assert caught.value.exit_status == 2
        assert "target: weights" in caught.value.details


def refusal(check: Callable[[MemoryPlan], None], *overrides: str, available_bytes: int) -> str:
    with pytest.raises(MemoryPlanError) as caught:
        check(plan(*overrides, available_bytes=available_bytes))
    return caught.value.remedy.splitlines()[0]


@pytest.mark.parametrize(
    ("override", "key", "now", "then"),
    [
        ("training.lora.rank=128", "training.lora.rank", "128", "8"),
        ("training.batch_size=64", "training.batch_size", "64", "1"),
        ("training.max_sequence_length=400000", "training.max_sequence_length", "400000", "2048"),
        ("generation.max_tokens=2048", "generation.max_tokens", "2048", "512"),
        ("memory.gradient_checkpointing=false", "memory.gradient_checkpointing", "false", "true"),
    ],
)
def test_training_advice_names_the_setting_that_is_too_high(
    override: str, key: str, now: str, then: str
) -> None:
    available_bytes = plan().training_bytes
    advice = refusal(MemoryPlan.check_training, override, available_bytes=available_bytes)
    assert advice.startswith(f"Set {key} to {then} (now {now}): that needs ")


def test_following_the_advice_helps() -> None:
    available_bytes = plan().training_bytes * 2 // 3
    advice = refusal(MemoryPlan.check_training, available_bytes=available_bytes)
    change = re.match(r"Set (\S+) to (\S+) ", advice)
    assert change is not None
    plan(f"{change[1]}={change[2]}", available_bytes=available_bytes).check_training()


def test_generation_advice_shortens_the_cache_where_that_is_enough() -> None:
    available_bytes = plan().generation_bytes
    override = "models.target.max_kv_cache_tokens=1000000"
    advice = refusal(MemoryPlan.check_generation, override, available_bytes=available_bytes)
    assert advice.startswith("Set models.target.max_kv_cache_tokens to 4096 (now 1000000)")


def test_where_no_setting_is_enough_a_smaller_model_is_named() -> None:
    advice = refusal(MemoryPlan.check_generation, available_bytes=GIB)
    assert advice.startswith(
        "Choose a smaller models.target.name (now mlx-community/Qwen2.5-3B-Instruct-4bit)"
    )
    advice = refusal(MemoryPlan.check_training, available_bytes=GIB // 2)
    assert advice.startswith("Choose a smaller models.draft.name")


def test_a_rank_above_a_modules_side_is_refused() -> None:
    with pytest.raises(MemoryPlanError, match=r"training\.lora\.rank = 129 is too high for v_proj") as caught:
        plan("training.lora.rank=129")
    assert "Set it to 128 or less" in caught.value.remedy
    plan("training.lora.rank=128")
    plan("training.lora.rank=896", "training.lora.target_modules=[q_proj]")


def test_the_table_shows_every_part_and_the_totals() -> None:
    p = plan()
    lines = render(p).splitlines()
    assert len(lines) == 1 + len(p.parts) + 4
    for p_, line in zip(p.parts, lines[1:], strict=False):
        assert line.startswith(p_.label)
        assert f"{p_.num_bytes / GIB:.2f} GiB" in line
    assert lines[-1].split() == ["available", "64.00", "GiB"]


def test_without_a_number_the_machines_memory_counts() -> None:
    assert available_memory_bytes() > 0
    assert plan_memory(TARGET, DRAFT, Config(), num_suffix_tokens=0).available_bytes > 0


def test_what_suffix_matches_remember_is_counted_where_they_are_looked_for() -> None:
    remembered = plan("speculative.suffix.megabytes=50")
    assert part(remembered, "past answers") == 50_000_000
    for off in ("speculative.suffix.enabled=false", "speculative.schedule=fixed"):
        assert not [one for one in plan(off).parts if one.label == "past answers"]
    scratch = "activations and logits"
    wide, narrow = (plan(f"speculative.suffix.max_draft_tokens={most}") for most in (64, 1))
    assert part(wide, scratch) > part(narrow, scratch)
