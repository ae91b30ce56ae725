"""A stored request as its turns and tokens: no text is lost, and p and q are those of the trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toy_tokenizers
from draftloop.models.tokenizer import Message, Tokenizer
from draftloop.reporting.conversation import (
    PREVIEW_CHARACTERS,
    Turn,
    answer_preview,
    answer_tokens_of,
    prompt_preview,
    turns_of,
)
from draftloop.storage.records import RequestRecord, TraceRows
from draftloop.types import TokenKind
from reporting.sample import sample_requests

TEMPLATE = sample_requests(1)[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(toy_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


def record(ids: list[int], kinds: list[int], drafted: list[int], q: float, top: list[int]) -> RequestRecord:
    """An answer whose rows all have these likeliest tokens: half the mass, a quarter, and so on."""
    rows = len(ids)
    top_ids = np.array(top + [-2] * (32 - len(top)), np.int32)
    traces = TraceRows(
        round_index=np.arange(rows, dtype=np.int32),
        kinds=np.array(kinds, np.uint8),
        draft_ids=np.array(drafted, np.int32),
        draft_probs=np.full(rows, q, np.float32),
        top_ids=np.tile(top_ids, (rows, 1)),
        top_logprobs=np.tile(-np.log(2) * np.arange(1, 33, dtype=np.float32), (rows, 1)),
        tail_mass=np.zeros(rows, np.float32),
    )
    return replace(TEMPLATE, answer_tokens=np.array(ids, np.int32), traces=traces)


def test_a_prompt_falls_into_its_turns(tokenizer: Tokenizer) -> None:
    said = [Message("system", "Be brief."), Message("user", "user\nof what?"), Message("assistant", "Tea.")]
    prompt = tokenizer.chat_tokens([*said, Message("user", "  More\n tea ")])
    turns = turns_of(prompt, tokenizer)
    assert turns == [*(Turn(one.role, one.content) for one in said), Turn("user", "More\n tea")]
    assert prompt_preview(prompt, tokenizer) == "More tea"


def test_a_role_may_stand_between_special_tokens_and_a_prompt_without_any_is_one_turn(
    tokenizer: Tokenizer,
) -> None:
    start, end = tokenizer.encode("<|im_start|>"), tokenizer.encode("<|im_end|>")
    headed = [
        *start,
        *tokenizer.encode("user"),
        *end,
        *tokenizer.encode("\n\nhello"),
        *start,
        *tokenizer.encode("model"),
    ]
    assert turns_of(headed, tokenizer) == [Turn("user", "hello")]
    assert turns_of(tokenizer.encode("hello"), tokenizer) == [Turn("", "hello")]
    assert turns_of([], tokenizer) == []
    assert prompt_preview([], tokenizer) == ""


def test_previews_are_one_short_line(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\n b " * 100)
    assert answer_preview(ids[:10], tokenizer) == "a b a b"
    assert len(prompt_preview(ids, tokenizer)) <= PREVIEW_CHARACTERS + 1


def test_p_and_q_are_those_of_the_trace(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    kinds = [
        list(TokenKind).index(kind) for kind in (TokenKind.ACCEPTED, TokenKind.RECOVERED, TokenKind.BONUS)
    ]
    accepted, recovered, bonus = answer_tokens_of(
        record([a, b, c], kinds, [a, a, -1], 0.75, [a, b]), tokenizer
    )
    assert (accepted.text, accepted.kind, accepted.drafted) == ("a", TokenKind.ACCEPTED, "a")
    assert (accepted.p, accepted.p_drafted, accepted.q) == pytest.approx((0.5, 0.5, 0.75))
    assert (recovered.name, recovered.kind, recovered.drafted) == ("b", TokenKind.RECOVERED, "a")
    assert (recovered.p, recovered.p_drafted, recovered.q) == pytest.approx((0.25, 0.5, 0.75))
    assert (bonus.kind, bonus.drafted, bonus.p_drafted, bonus.q) == (TokenKind.BONUS, None, None, None)
    # It was not among the likeliest: only a bound is known.
    assert bonus.p is None
    assert bonus.p_below == pytest.approx(2.0**-32)
    assert [one.round for one in (accepted, recovered, bonus)] == [0, 1, 2]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.text(max_size=12), st.integers(0, 3))
def test_the_tokens_texts_together_are_the_answer(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    ids = [*ids[: max(len(ids) - cut, 0)], min(tokenizer.eos_token_ids)]
    rows = len(ids)
    tokens = answer_tokens_of(record(ids, [0] * rows, ids, 0.5, [0]), tokenizer)
    assert "".join(one.text for one in tokens) == tokenizer.decode(ids)
    assert all(one.name for one in tokens)
    assert tokens[-1].name == "end of answer"
