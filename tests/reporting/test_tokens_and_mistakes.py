"""The hardest tokens: counted as the traces have them, and shown so that every character can be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toy_tokenizers
from draftloop.models.tokenizer import Tokenizer
from draftloop.reporting.mistakes import count_mistakes
from draftloop.reporting.tokens import LONGEST_CHARACTERS, TokenNames, visible
from draftloop.storage.records import RequestRecord, TraceRows
from reporting.sample import sample_requests

if TYPE_CHECKING:
    from pathlib import Path

ACCEPTED, RECOVERED, BONUS, TARGET = range(4)
TEMPLATE = sample_requests(1)[0]


def request(rows: list[tuple[int, int, int, float]]) -> RequestRecord:
    """A request of rows (kind, proposed, emitted, q)."""
    kinds, proposed, emitted, q = (np.array(column) for column in zip(*rows, strict=True))
    count = len(rows)
    traces = TraceRows(
        round_index=np.zeros(count, np.int32),
        kinds=kinds.astype(np.uint8),
        draft_ids=proposed.astype(np.int32),
        draft_probs=q.astype(np.float32),
        top_ids=np.zeros((count, 32), np.int32),
        top_logprobs=np.zeros((count, 32), np.float32),
        tail_mass=np.zeros(count, np.float32),
    )
    return replace(TEMPLATE, answer_tokens=emitted.astype(np.int32), traces=traces)


def test_swaps_are_counted_over_requests() -> None:
    records = [
        request([(ACCEPTED, 7, 7, 0.9), (RECOVERED, 7, 9, 0.4), (TARGET, -1, 9, 0.0)]),
        request([(RECOVERED, 7, 9, 0.8), (RECOVERED, 8, 7, 0.5), (BONUS, -1, 7, 0.0)]),
    ]
    mistakes = count_mistakes(records, most=10)
    assert (mistakes.requests, mistakes.tested, mistakes.rejected) == (2, 4, 3)
    first, second = mistakes.rows
    assert (first.proposed_id, first.wanted_id, first.times) == (7, 9, 2)
    assert (first.proposed_rejected, first.proposed_tested) == (2, 3)
    assert first.confidence == pytest.approx(0.6)
    assert (second.proposed_id, second.wanted_id, second.times) == (8, 7, 1)


def test_only_the_most_frequent_swaps_are_kept() -> None:
    rows = [(RECOVERED, token, 99, 0.5) for token in range(5) for _ in range(token + 1)]
    mistakes = count_mistakes([request(rows)], most=2)
    assert [one.proposed_id for one in mistakes.rows] == [4, 3]
    assert mistakes.rejected == 15


def test_nothing_tested_is_nothing_wrong() -> None:
    mistakes = count_mistakes([request([(TARGET, -1, 9, 0.0)])], most=5)
    assert (mistakes.requests, mistakes.tested, mistakes.rejected, mistakes.rows) == (1, 0, 0, ())


@given(st.text())
def test_every_character_of_a_shown_token_can_be_seen(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert " " not in shown
    assert len(text) <= LONGEST_CHARACTERS or shown.endswith("…")
    assert bool(shown) == bool(text)


def test_marks_stand_for_what_is_invisible() -> None:
    assert visible("  a\n\t") == "␣␣a↵⇥"
    assert visible("\u200b\u202e\x00") == "U+200BU+202EU+0000"
    assert visible("<b>") == "<b>"


def test_a_byte_level_token_is_shown_with_its_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(toy_tokenizers.byte_level(tmp_path))
    names = TokenNames(tokenizer)
    (the,) = tokenizer.encode(" the")
    assert (names.name(the).text, names.name(the).plain) == ("␣the", True)
    half = tokenizer.encode("日")[0]
    assert not names.name(half).plain
    assert str(half) in names.name(half).text
    eos, other = tokenizer.encode("<|endoftext|><|im_start|>")
    assert (names.name(eos).text, names.name(eos).plain) == ("end of answer", False)
    assert names.name(other).text == f"special token ({other})"
    assert not names.name(10_000_000).plain


@pytest.mark.parametrize("kind", ["metaspace", "byte_fallback"])
def test_a_decoder_that_drops_leading_spaces_does_not_hide_them(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.load(getattr(toy_tokenizers, kind)(tmp_path))
    (word,) = [token for token in tokenizer.encode("bc a") if tokenizer.decode([token]) == "a"]
    assert TokenNames(tokenizer).name(word).text == "␣a"


def test_without_a_tokenizer_a_token_is_its_number() -> None:
    names = TokenNames(None)
    assert not names.readable
    assert (names.name(17).text, names.name(17).plain) == ("token 17", False)
