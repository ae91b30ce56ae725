"""Which requests are failures, and what is held out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.learning.failures import split, threshold_of
from draftloop.storage.records import RequestSummary


def summary(
    number: int,
    accepted: int = 5,
    drafted: int = 10,
    *,
    held_out: bool = False,
    trained_by: str | None = None,
    rounds: int | None = None,
) -> RequestSummary:
    return RequestSummary(
        id=number,
        created_s=float(number),
        adapter=None,
        domain="letters",
        source="chat",
        held_out=held_out,
        trained_by=trained_by,
        num_prompt_tokens=4,
        num_answer_tokens=20,
        num_draft_tokens=4,
        temperature=0.0,
        rounds=max(1, -(-drafted // 4)) if rounds is None else rounds,
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        tested_tokens=drafted,
        alpha_sum=float(accepted),
        prompt_s=0.1,
        decode_s=1.0,
        stored_bytes=1000,
    )


def with_rates(hundredths: list[int]) -> list[RequestSummary]:
    return [summary(i, accepted, 100) for i, accepted in enumerate(hundredths)]


SUMMARIES = st.lists(
    st.tuples(st.integers(0, 10), st.sampled_from([0, 10]), st.booleans(), st.sampled_from([None, "a0001"])),
    max_size=40,
).map(
    lambda rows: [
        summary(i, min(accepted, drafted), drafted, held_out=held_out, trained_by=trained_by)
        for i, (accepted, drafted, held_out, trained_by) in enumerate(rows)
    ]
)


@pytest.mark.parametrize("setting", [0.5, 0.0, 1.0])
def test_a_number_is_itself(setting):
    assert threshold_of(setting, with_rates([10, 90])) == setting


def test_auto_marks_the_worst_thirty_percent():
    recent = with_rates([*range(90, 62, -1), *range(20, 32)])
    parts = split(recent, threshold_of("auto", recent))
    assert [one.id for one in parts.failures] == list(range(28, 40))


def test_auto_looks_at_the_newest_two_hundred_with_drafts():
    old, new = [1] * 100, [*range(40, 90)] * 4
    recent = with_rates(old + new)
    without_drafts = [summary(1000 + i, 0, 0) for i in range(500)]
    assert threshold_of("auto", [*reversed(recent), *without_drafts]) == 0.55


@pytest.mark.parametrize("rates", [[], [50], [50] * 30, [100] * 3, [0] * 3])
def test_auto_marks_nothing_where_all_are_equal(rates):
    recent = with_rates(rates)
    assert split(recent, threshold_of("auto", recent)).failures == ()


def test_the_worst_are_marked_together_where_they_tie():
    recent = with_rates([0] * 8 + [60] * 2)
    assert len(split(recent, threshold_of("auto", recent)).failures) == 8


def test_a_tie_at_the_threshold_is_no_failure():
    recent = with_rates([10, 20, *[60] * 8])
    assert len(split(recent, threshold_of("auto", recent)).failures) == 2


@given(st.lists(st.integers(0, 100), max_size=60))
def test_auto_marks_some_unless_all_are_equal_and_never_all(rates):
    recent = with_rates(rates)
    failures = len(split(recent, threshold_of("auto", recent)).failures)
    lowest = rates.count(min(rates, default=0))
    assert failures <= max(-(-len(rates) * 3 // 10), lowest)
    assert (failures > 0) == (len(set(rates)) > 1)
    assert failures < max(len(rates), 1)


@given(SUMMARIES, st.floats(0, 1))
def test_every_request_is_in_one_part(summaries, threshold):
    parts = split(summaries, threshold)
    numbers = [
        one.id for part in (parts.failures, parts.replay, parts.validation, parts.gate) for one in part
    ]
    assert sorted(numbers) == [one.id for one in summaries]


@given(SUMMARIES, st.floats(0, 1))
def test_a_failure_is_below_the_threshold_drafted_untrained_and_not_held_out(summaries, threshold):
    parts = split(list(reversed(summaries)), threshold)
    expected = [
        one.id
        for one in summaries
        if one.drafted_tokens
        and one.accepted_tokens / one.drafted_tokens < threshold
        and not one.trained_by
        and not one.held_out
    ]
    assert [one.id for one in parts.failures] == expected
    assert not any(one.held_out for one in (*parts.failures, *parts.replay))


def test_a_request_at_the_threshold_is_replay():
    parts = split([summary(1, 5), summary(2, 4), summary(3, 0, 0), summary(4, 4, trained_by="a0001")], 0.5)
    assert [one.id for one in parts.failures] == [2]
    assert [one.id for one in parts.replay] == [1, 3, 4]


@pytest.mark.parametrize(("count", "validation"), [(0, []), (3, []), (4, [3]), (11, [3, 7])])
def test_every_fourth_held_out_request_validates(count, validation):
    parts = split([summary(i, held_out=True) for i in range(count)], 0.5)
    assert [one.id for one in parts.validation] == validation
    assert [one.id for one in parts.gate] == [i for i in range(count) if i not in validation]


def test_a_bad_draft_that_was_asked_for_little_is_a_failure_all_the_same():
    """11 of 20 single drafts kept; at four a round (0.55 + 0.55² + 0.55³ + 0.55⁴) / 4 = 0.28 would be."""
    cautious = summary(1, accepted=11, drafted=20, rounds=20)
    good = summary(2, accepted=18, drafted=20, rounds=20)
    full = summary(3, accepted=11, drafted=20, rounds=5)
    parts = split([cautious, good, full], 0.5)
    assert parts.failures == (cautious,)
    assert parts.replay == (good, full)
    assert split([cautious], 0.27).failures == ()


def test_a_last_round_that_was_cut_is_judged_as_it_was():
    cut = summary(1, accepted=9, drafted=17, rounds=5)
    assert split([cut], 9 / 17).failures == ()
    assert split([cut], 9 / 17 + 0.001).failures == (cut,)


def test_rounds_of_suffix_matches_make_nobody_cautious():
    """Five full rounds of the draft and thirty others: it is judged by what it drafted, not by its alpha."""
    full = replace(summary(1, accepted=11, drafted=20, rounds=35), suffix_rounds=30, suffix_tokens=90)
    assert split([full], 0.5).failures == ()
    assert split([replace(full, suffix_rounds=0)], 0.5).failures != ()


def test_a_draft_that_matches_left_hardly_a_round_is_not_judged():
    """One wrong guess in an answer that matches wrote; four are what one probe tests."""
    matched = replace(summary(1, accepted=0, drafted=1), suffix_rounds=9, suffix_tokens=18)
    probed = replace(matched, id=2, drafted_tokens=4, tested_tokens=4, rounds=13)
    assert split([matched, probed], 0.5).failures == (probed,)
    assert threshold_of("auto", [matched] * 3 + with_rates([50, 60, 70])) == 0.6


def test_a_short_answer_is_judged_by_what_it_has():
    short = replace(summary(1, accepted=0, drafted=1), num_answer_tokens=3)
    assert split([short], 0.5).failures == (short,)
