"""Which tokens a cut head keeps: what the stored answers teach, and when `auto` dares to cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from draftloop.learning.vocabulary import Wanted, choose_vocabulary
from draftloop.storage.records import PairKey
from draftloop.storage.store import open_store
from storage.storage_samples import OTHER_PAIR, PAIR, make_request, make_traces

USABLE = 100_000
SPECIAL = frozenset({USABLE - 1, USABLE - 2})
WANTED = Wanted(draft_tokens=USABLE + 64, known_tokens=USABLE, always=SPECIAL)


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path, max_megabytes=100) as store:
        yield store


def tell(
    store, count, tokens, *, rows=64, first_seed=0, domain="law", pair=PAIR, top_ids=None, logprobs=(-2.0,)
):
    """Store answers whose tokens are drawn from `tokens`, and nothing else among the likeliest."""
    for seed in range(first_seed, first_seed + count):
        answer = np.random.default_rng(seed).choice(tokens, rows).astype(np.int32)
        traces = make_traces(rows, seed)
        traces.top_ids[:] = answer[:, None] if top_ids is None else top_ids
        traces.top_logprobs[:] = np.repeat(logprobs, 32 // len(logprobs))
        store.requests.add(
            make_request(rows=rows, seed=seed, answer_tokens=answer, traces=traces, domain=domain, pair=pair)
        )


def choose(store, setting, wanted=WANTED, pair=PAIR):
    cut = choose_vocabulary(store, pair, setting, wanted)
    return None if cut is None else cut.ids


def test_without_answers_the_lowest_ids_are_kept_and_the_special_ones(store):
    for source in (None, store):
        ids = choose(source, 500)
        assert ids.tolist() == [*range(500), *sorted(SPECIAL)]


@pytest.mark.parametrize("setting", ["full", USABLE, USABLE + 1])
def test_a_head_that_keeps_all_is_not_cut(store, setting):
    assert choose(store, setting) is None


def test_what_was_emitted_is_kept(store):
    rare = np.arange(60_000, 60_100)
    tell(store, 40, rare)
    ids = choose(store, 300)
    assert np.isin(rare, ids).all()
    assert np.isin(sorted(SPECIAL), ids).all()
    assert np.isin(np.arange(200), ids).all()
    assert len(ids) == 302


def test_what_was_likely_is_kept_though_it_was_never_emitted(store):
    """Not so what was held for less likely than a thousandth: there is too much of it."""
    tell(store, 40, np.arange(50), top_ids=np.arange(70_000, 70_032, dtype=np.int32), logprobs=[-2.0, -8.0])
    ids = choose(store, 100)
    assert np.isin(np.arange(70_000, 70_016), ids).all()
    assert not np.isin(np.arange(70_016, 70_032), ids).any()


def test_heavier_tokens_go_before_lighter_ones(store):
    tell(store, 30, np.arange(60_000, 60_010))
    tell(store, 10, np.arange(70_000, 70_010), first_seed=30)
    ids = choose(store, 10)
    assert ids.tolist() == [*range(60_000, 60_010), *sorted(SPECIAL)]


def test_another_pairs_answers_teach_nothing(store):
    tell(store, 40, np.arange(60_000, 60_100), pair=OTHER_PAIR)
    assert choose(store, 500).max(initial=0, where=[True] * 500 + [False] * 2) < 500
    assert 60_000 in choose(store, 500, pair=OTHER_PAIR)


def test_ids_that_the_draft_has_not_are_never_kept(store):
    """The target may know more: padding of its own."""
    tell(store, 40, np.arange(900, 1100))
    ids = choose(store, 200, Wanted(draft_tokens=1000, known_tokens=1000, always=frozenset({999, 1050})))
    assert ids.max() == 999
    assert np.isin(np.arange(900, 1000), ids).all()


def test_a_version_lasts_until_answers_have_doubled(store):
    tell(store, 17, np.arange(60_000, 60_100))
    first = choose(store, 300)
    tell(store, 14, np.arange(70_000, 70_100), first_seed=17)
    assert choose(store, 300).tolist() == first.tolist()
    tell(store, 3, np.arange(70_000, 70_100), first_seed=31)
    assert np.isin(np.arange(70_000, 70_100), choose(store, 300)).sum() > 50


def test_a_version_of_a_long_store_lasts_until_nothing_that_taught_it_would_be_read(store, monkeypatch):
    monkeypatch.setattr("draftloop.learning.vocabulary.WINDOW_TOKENS", 20 * 64)
    tell(store, 80, np.arange(60_000, 60_100))
    first = choose(store, 300)
    tell(store, 19, np.arange(70_000, 70_100), first_seed=80)
    assert choose(store, 300).tolist() == first.tolist()
    tell(store, 1, np.arange(70_000, 70_100), first_seed=99)
    again = choose(store, 300)
    assert np.isin(np.arange(70_000, 70_100), again).all()
    assert not np.isin(np.arange(60_000, 60_100), again).any()


def test_a_version_lasts_though_its_answers_make_room_for_others(tmp_path):
    """At its size bound each answer evicts one, and what is stored never doubles."""
    with open_store(tmp_path, max_megabytes=1) as store:
        answers = 0

        def go_on(count):
            nonlocal answers
            for _ in range(count):
                tell(store, 1, np.arange(60_000 + 20 * answers, 60_100 + 20 * answers), first_seed=answers)
                answers += 1

        go_on(60)
        while store.requests.count() == answers:
            go_on(1)
        first, chosen_at = choose(store, 300), answers
        while answers < 2 * chosen_at - 1:
            go_on(1)
            assert choose(store, 300).tolist() == first.tolist()
        assert store.requests.list(PAIR)[0].id > chosen_at // 2
        go_on(1)
        assert choose(store, 300).tolist() != first.tolist()


def test_each_wish_has_a_version_of_its_own(store):
    tell(store, 17, np.arange(60_000, 60_100))
    other = replace(WANTED, always=frozenset({7_777}))
    assert [len(choose(store, 300)), len(choose(store, 400)), len(choose(store, 300))] == [302, 402, 302]
    assert 7_777 in choose(store, 300, other)
    assert 7_777 not in choose(store, 300)


def test_a_store_that_is_only_read_teaches_and_remembers_nothing(store, tmp_path):
    tell(store, 17, np.arange(60_000, 60_100))
    with open_store(tmp_path, max_megabytes=100, read_only=True) as reader:
        assert np.isin(np.arange(60_000, 60_100), choose(reader, 300)).all()
        tell(store, 1, np.arange(70_000, 70_100), first_seed=17)
        assert np.isin(np.arange(70_000, 70_100), choose(reader, 300)).any()


class TestAuto:
    def test_few_answers_are_not_enough(self, store):
        tell(store, 20, np.arange(60_000, 60_100))
        assert choose(store, "auto") is None
        assert choose(None, "auto") is None

    def test_answers_that_repeat_each_other_are_covered_by_the_smallest(self, store):
        tell(store, 140, np.arange(60_000, 60_300))
        ids = choose(store, "auto")
        assert len(ids) == 16_384 + len(SPECIAL)
        assert np.isin(np.arange(60_000, 60_300), ids).all()

    def test_answers_that_are_always_new_are_not(self, store):
        for first in range(140):
            tell(store, 1, np.arange(75_000 + 64 * first, 75_064 + 64 * first), first_seed=first)
        assert choose(store, "auto") is None

    def test_one_domain_that_is_not_covered_is_enough_to_cut_nothing(self, store):
        tell(store, 140, np.arange(60_000, 60_300))
        assert choose(store, "auto") is not None
        tell(store, 140, np.arange(60_000, 60_300), first_seed=140)
        for first in range(20):
            tokens = np.arange(75_000 + 64 * first, 75_064 + 64 * first)
            tell(store, 1, tokens, first_seed=300 + first, domain="中文")
        assert choose(store, "auto") is None

    @pytest.mark.parametrize("from_text", [False, True])
    def test_what_the_text_itself_gives_is_not_missed(self, store, from_text):
        """Answers that repeat their own new words, as a summary repeats its document's."""
        for first in range(140):
            tokens = np.arange(75_000 + 64 * first, 75_064 + 64 * first, dtype=np.int32)
            store.requests.add(
                make_request(
                    rows=64, seed=first, prompt_tokens=tokens, answer_tokens=tokens, traces=make_traces(64)
                )
            )
        wanted = replace(WANTED, from_text=from_text)
        assert (choose(store, "auto", wanted) is not None) is from_text

    def test_a_small_vocabulary_is_left_alone(self, store):
        tell(store, 140, np.arange(100))
        assert choose(store, "auto", Wanted(30_000, 30_000, frozenset())) is None
        assert choose(store, "auto", Wanted(33_000, 33_000, frozenset())) is not None


def test_other_names_begin_anew(store):
    tell(store, 40, np.arange(60_000, 60_100))
    assert 60_000 not in choose(store, 300, pair=PairKey("other", PAIR.draft))
