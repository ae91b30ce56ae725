"""The active adapter is taken back where live alpha has fallen, and only there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import pupils
from draftloop.learning.watch import alpha_fall, revert_if_falling
from draftloop.storage.records import (
    AdapterRecord,
    AdapterStatus,
    PairKey,
    RequestRecord,
    RequestSummary,
    TraceRows,
)
from draftloop.storage.store import open_store
from draftloop.types import Sampling

PAIR = PairKey("target", "draft")
ROWS = 50


def summary(
    number: int,
    alpha: float,
    domain: str = "a",
    temperature: float = 0.0,
    drafted: int = 60,
    vocabulary: str | None = None,
) -> RequestSummary:
    return RequestSummary(
        id=number,
        created_s=0.0,
        adapter=None,
        domain=domain,
        source="chat",
        held_out=False,
        trained_by=None,
        num_prompt_tokens=5,
        num_answer_tokens=ROWS,
        num_draft_tokens=4,
        temperature=temperature,
        rounds=20,
        drafted_tokens=drafted,
        accepted_tokens=30,
        tested_tokens=ROWS,
        alpha_sum=alpha * ROWS,
        prompt_s=0.1,
        decode_s=1.0,
        stored_bytes=1,
        vocabulary=vocabulary,
    )


def requests(alphas, **options) -> list[RequestSummary]:
    return [summary(number, float(alpha), **options) for number, alpha in enumerate(alphas)]


def noisy(mean: float, count: int, seed: int, deviation: float = 0.1) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(mean, deviation, count), 0, 1)


def with_matches(summaries: list[RequestSummary], tokens: int) -> list[RequestSummary]:
    """The same drafts in answers of which suffix matches wrote so many tokens more, in sixty rounds."""
    return [
        replace(
            one,
            num_answer_tokens=one.num_answer_tokens + tokens,
            rounds=one.rounds + 60,
            suffix_rounds=60,
            suffix_tokens=tokens,
        )
        for one in summaries
    ]


def test_suffix_matches_do_not_hide_a_fall() -> None:
    """Drafts a round are counted over the draft's rounds, so requests with matches are compared too."""
    before, live = requests(noisy(0.8, 40, 0)), requests(noisy(0.6, 20, 1))
    fall = alpha_fall(before, live)
    assert fall is not None
    assert alpha_fall(with_matches(before, 150), with_matches(live, 150)) == fall


def test_matches_that_take_the_easy_positions_are_no_fall() -> None:
    before, live = requests(noisy(0.8, 40, 0)), requests(noisy(0.6, 20, 1))
    assert alpha_fall(before, with_matches(live, 150)) is None


def test_requests_weigh_by_what_was_tested() -> None:
    """Every second request has one tested position, and it was lost: that says little about the draft."""
    before = requests(noisy(0.8, 40, 0))
    single = [replace(one, tested_tokens=1, alpha_sum=0.0) for one in requests([0.0] * 20)]
    assert alpha_fall(before, [*requests(noisy(0.8, 20, 1)), *single]) is None
    fall = alpha_fall(before, [*requests(noisy(0.6, 20, 1)), *single])
    assert fall == pytest.approx(0.2, abs=0.06)


def test_a_fall_is_seen_and_measured():
    fall = alpha_fall(requests(noisy(0.8, 60, 0)), requests(noisy(0.65, 40, 1)))
    assert fall == pytest.approx(0.15, abs=0.05)


def test_a_head_that_was_cut_meanwhile_is_no_fall():
    """What was cut off no adapter brings back."""
    before, live = noisy(0.8, 60, 0), noisy(0.65, 40, 1)
    assert alpha_fall(requests(before), requests(live, vocabulary="9-abc")) is None
    fall = alpha_fall(requests(before, vocabulary="9-abc"), requests(live, vocabulary="9-abc"))
    assert fall == pytest.approx(0.15, abs=0.05)


def test_a_rise_is_no_fall():
    assert alpha_fall(requests(noisy(0.7, 60, 0)), requests(noisy(0.85, 40, 1))) is None
    assert alpha_fall(requests([0.7] * 10), requests([0.7] * 10)) is None


def test_noise_is_no_fall():
    """Ten looks at an adapter that changes nothing, a hundred times: 2 in 100 are expected."""
    reverted = 0
    for seed in range(100):
        before, live = requests(noisy(0.75, 100, 2 * seed)), noisy(0.75, 200, 2 * seed + 1)
        reverted += any(alpha_fall(before, requests(live[:count])) for count in range(20, 201, 20))
    assert reverted <= 6


def test_most_falls_of_six_points_are_seen():
    found = sum(
        alpha_fall(requests(noisy(0.75, 100, 2 * seed)), requests(noisy(0.69, 100, 2 * seed + 1))) is not None
        for seed in range(50)
    )
    assert found >= 40


def test_another_subject_is_no_fall():
    """Easy requests before, hard ones since: within each subject nothing has changed."""
    before = [*requests(noisy(0.9, 80, 0), domain="easy"), *requests(noisy(0.5, 10, 1), domain="hard")]
    live = [*requests(noisy(0.9, 5, 2), domain="easy"), *requests(noisy(0.5, 60, 3), domain="hard")]
    assert alpha_fall(before, live) is None
    everything_alike = [summary(one.id, one.alpha_sum / ROWS) for one in before]
    assert alpha_fall(everything_alike, [summary(one.id, one.alpha_sum / ROWS) for one in live])


def test_a_subject_that_is_new_or_rare_cannot_be_compared():
    before = requests(noisy(0.9, 80, 0), domain="known")
    assert alpha_fall(before, requests(noisy(0.3, 40, 1), domain="new")) is None
    assert alpha_fall(before, requests([0.1, 0.1], domain="known")) is None
    assert alpha_fall([], requests(noisy(0.3, 40, 1))) is None


def test_another_temperature_is_no_fall():
    before = requests(noisy(0.9, 40, 0), temperature=0.0)
    assert alpha_fall(before, requests(noisy(0.6, 40, 1), temperature=1.0)) is None
    assert alpha_fall(before, requests(noisy(0.6, 40, 1), temperature=0.0))


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path, max_megabytes=10) as store:
        yield store


def answer(store, alphas, adapter=None, domain="a"):
    for alpha in alphas:
        rows = 4
        traces = TraceRows(
            round_index=np.arange(rows, dtype=np.int32),
            kinds=np.ones(rows, np.uint8),
            draft_ids=np.zeros(rows, np.int32),
            draft_probs=np.ones(rows, np.float32),
            top_ids=np.tile(np.arange(32, dtype=np.int32), (rows, 1)),
            top_logprobs=np.full((rows, 32), -4.0, np.float32),
            tail_mass=np.full(rows, 0.4, np.float32),
        )
        store.requests.add(
            RequestRecord(
                created_s=0.0,
                pair=PAIR,
                adapter=adapter,
                domain=domain,
                source="chat",
                key=None,
                split_key=str(store.requests.count()),
                prompt_tokens=np.arange(5, dtype=np.int32),
                answer_tokens=np.arange(rows, dtype=np.int32),
                sampling=Sampling(),
                min_tokens=1,
                num_draft_tokens=4,
                seed=0,
                finish_reason="stop",
                rounds=4,
                drafted_tokens=8,
                accepted_tokens=4,
                tested_tokens=rows,
                alpha_sum=float(alpha) * rows,
                prompt_s=0.0,
                decode_s=1.0,
                traces=traces,
            )
        )


def promote(store, name, parent=None):
    store.adapters.add(
        AdapterRecord(name, PAIR, parent, 0.0, AdapterStatus.REJECTED, "unfused", None, "new", {})
    )
    store.adapters.promote(name, reason="better")


def test_a_fall_brings_the_parent_back(store):
    answer(store, noisy(0.8, 40, 0))
    promote(store, "a0001")
    answer(store, noisy(0.5, 19, 1), "a0001")
    assert revert_if_falling(store, PAIR, after_requests=20) is None
    answer(store, [0.5], "a0001")
    reason = revert_if_falling(store, PAIR, after_requests=20)
    assert "a0001 was reverted: over its 20 requests alpha is 0.2" in reason
    assert store.adapters.active(PAIR) is None
    record = store.adapters.get("a0001")
    assert (record.status, record.reason) == (AdapterStatus.REVERTED, reason)
    assert revert_if_falling(store, PAIR, after_requests=20) is None


def test_an_adapter_that_holds_its_promise_stays(store):
    answer(store, noisy(0.8, 40, 0))
    promote(store, "a0001")
    for _ in range(3):
        answer(store, noisy(0.85, 20, 1), "a0001")
        assert revert_if_falling(store, PAIR, after_requests=20) is None
    assert store.adapters.active(PAIR).name == "a0001"


def test_the_level_before_is_that_of_the_draft_whose_place_it_took(store):
    """The second adapter is better than the bare draft and worse than the first."""
    answer(store, noisy(0.5, 150, 0))
    promote(store, "a0001")
    answer(store, noisy(0.8, 40, 1), "a0001")
    promote(store, "a0002", "a0001")
    answer(store, noisy(0.65, 40, 2), "a0002")
    assert revert_if_falling(store, PAIR, after_requests=20)
    assert store.adapters.active(PAIR).name == "a0001"


def test_nothing_active_is_nothing_to_do(store):
    answer(store, noisy(0.8, 40, 0))
    assert revert_if_falling(store, PAIR, after_requests=20) is None


def test_requests_of_an_earlier_promotion_do_not_count(store):
    answer(store, noisy(0.8, 40, 0))
    promote(store, "a0001")
    answer(store, noisy(0.3, 20, 1), "a0001")
    store.adapters.activate(PAIR, None)
    answer(store, noisy(0.8, 20, 2))
    store.adapters.activate(PAIR, "a0001")
    assert revert_if_falling(store, PAIR, after_requests=20) is None
    answer(store, noisy(0.8, 20, 3), "a0001")
    assert revert_if_falling(store, PAIR, after_requests=20) is None


def test_the_recorder_takes_a_bad_adapter_back_while_answers_go_on(classroom):
    """Through the engine: an adapter that confuses the draft is worn, and gone after the requests allowed."""
    with classroom.store() as store:
        pupils.add_adapter(classroom, store, "a0001", confused=True)
        store.adapters.promote("a0001", reason="a mistake")
        engine = classroom.engine(store, adaptation__revert_after_requests=6)
        worn = [one.adapter for one in pupils.ask(engine, range(300, 310))]
        assert worn == ["a0001"] * 6 + [None] * 4
        assert store.adapters.get("a0001").status is AdapterStatus.REVERTED
        answers = store.requests.list(classroom.pair)[-10:]
    assert [one.adapter for one in answers] == worn


def test_rounds_of_other_lengths_are_not_compared():
    """A schedule that drafts one token a round tests the easy ones alone."""
    before, live = noisy(0.8, 60, 0), noisy(0.65, 40, 1)
    assert alpha_fall(requests(before, drafted=20), requests(live)) is None
    assert alpha_fall(requests(before, drafted=20), requests(live, drafted=20)) is not None
