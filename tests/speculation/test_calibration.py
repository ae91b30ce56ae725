"""Calibration: what it measures of models that take time as they are told, and the file that remembers it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from draftloop.backends.base import NO_PROPOSAL
from draftloop.backends.vocabulary import CutVocabulary
from draftloop.errors import OutOfMemory
from draftloop.speculation import calibration
from draftloop.speculation.calibration import BUDGET_S, ServedRounds
from draftloop.speculation.remembered import MOST_TRIES, calibrated_costs, calibration_path, known_costs
from draftloop.speculation.stream import Pair
from draftloop.speculation.timing import time_proposals
from draftloop.types import Sampling

if TYPE_CHECKING:
    from pathlib import Path

FACTS = {"machine": "here", "target": "a", "draft": "b"}
SAMPLED = Sampling(temperature=0.7, top_p=0.9)
THREE = ServedRounds(3)


class Clock:
    """Time that passes only when a model works."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeCache:
    max_tokens: int = 512
    position: int = 0

    def read(self, n: int) -> None:
        self.position += n
        assert self.position <= self.max_tokens

    def trim(self, n: int) -> None:
        assert 0 <= n <= self.position
        self.position -= n

    def copy(self, n: int) -> int:
        assert 1 <= n <= self.position
        return n

    def paste(self, copied: int, n: int) -> None:
        assert 1 <= n <= copied
        self.position = n


class FakeModel:
    """Takes 50 ms and 10 a row for a verification; drafts for 20 ms a token and 3 ms a call; reads for 2 ms.

    Of sequences beside the first each takes 4 ms more to verify, and 1 ms in each step of the draft.
    """

    def __init__(
        self, clock: Clock, *, busy_calls: range = range(0), scale: float = 1.0, room: int = 512
    ) -> None:
        self.room = room
        self.clock, self.busy_calls, self.scale = clock, busy_calls, scale
        self.calls = 0
        self.jobs = []
        self.prefills = 0
        self.texts = []
        self.vocabulary = None
        self.architecture = SimpleNamespace(vocab_size=1000)

    def new_cache(self) -> FakeCache:
        return FakeCache(self.room)

    def prefill(self, batch) -> None:
        self.prefills += 1
        for job in batch:
            job.cache.read(len(job.tokens))

    def verify(self, batch) -> None:
        self.jobs += batch
        rows = 0
        for job in batch:
            rows += job.proposal.num_tokens + 1
            job.cache.read(job.proposal.num_tokens + 1)
        self._work(0.05 + 0.01 * rows + 0.004 * (len(batch) - 1))

    def propose(self, batch):
        for job in batch:
            self.texts.append(job.text)
            job.cache.read(len(job.unread) + job.num_draft_tokens - 1)
        k, greedy = batch[0].num_draft_tokens, batch[0].rules.sampling.greedy
        more_s = 0.001 * k * (len(batch) - 1)
        self._work(0.003 + 0.020 * k + 0.002 * (len(batch[0].unread) - 1) + more_s)
        proposal = replace(NO_PROPOSAL, tokens=(0,) * k, q=None if greedy else [[1.0]] * k, num_tokens=k)
        return [proposal] * len(batch)

    def _work(self, seconds: float) -> None:
        self.calls += 1
        self.clock.now_s += self.scale * seconds * (5 if self.calls in self.busy_calls else 1)


def measure_costs(*arguments):
    return calibration.measure_costs(*arguments).costs


def fakes(**options) -> tuple[Pair, Clock]:
    clock = Clock()
    return Pair(FakeModel(clock, **options), FakeModel(clock, **options)), clock


def test_each_model_reads_its_text_once():
    """Reading 64 tokens takes as long as ten steps; sequences that are timed together have copies."""
    pair, clock = fakes(scale=0.01)
    measure_costs(pair, THREE, clock)
    assert (pair.target.prefills, pair.draft.prefills) == (1, 1)


@pytest.mark.parametrize(("kept", "own"), [(None, 0), (997, 3), (100, 16)])
def test_a_cut_head_is_timed_with_a_texts_own_tokens(kept, own):
    """As it serves: they are a product of their own beside the chosen ones."""
    pair, clock = fakes(scale=0.01)
    pair.draft.vocabulary = None if kept is None else CutVocabulary(np.arange(kept, dtype=np.int32))
    measure_costs(pair, THREE, clock)
    for text in pair.draft.texts:
        assert len(set(text)) == own
        assert all(kept <= token < 1000 for token in text)


@pytest.mark.parametrize("cap", [1, 3, 8])
@pytest.mark.parametrize("busy", [range(0), range(4, 6)], ids=["quiet", "a busy moment"])
def test_the_costs_are_those_of_the_models(cap, busy):
    pair, clock = fakes(busy_calls=busy, scale=0.3)
    costs = measure_costs(pair, ServedRounds(cap), clock)
    assert [width for width, _ in costs.verify_s] == [*range(1, cap + 2), 16, 32]
    for width, seconds in costs.verify_s:
        assert seconds == pytest.approx(0.3 * (0.05 + 0.01 * width))
    assert costs.draft_s == pytest.approx(0.006)
    assert costs.draft_round_s == pytest.approx(0.0009)
    assert costs.read_s == pytest.approx(0.0006)
    assert costs.verify_more_s == pytest.approx(0.0012)
    assert costs.draft_more_s == pytest.approx(0.0003)


@pytest.mark.parametrize("cap", [1, 4])
@pytest.mark.parametrize("spare", [0, 1, 20])
def test_the_smallest_caches_that_settings_allow_are_measured(cap, spare):
    pair, clock = fakes(room=cap + 2 + spare)
    assert measure_costs(pair, ServedRounds(cap), clock).read_s == pytest.approx(0.002)


@pytest.mark.parametrize("cap", [1, 4, 16, 64])
@pytest.mark.parametrize("scale", [0.001, 0.1, 1.0, 5.0])
def test_the_budget_holds_whatever_is_measured(cap, scale):
    pair, clock = fakes(scale=scale)
    costs = measure_costs(pair, ServedRounds(cap), clock)
    # A step that takes longer than expected may end after the budget, but none begins.
    assert clock.now_s <= BUDGET_S + scale * 0.7
    assert costs.draft_s == pytest.approx(scale * 0.020)
    for width in (1, 2, 5, cap + 1):
        assert costs.verify_at(width) == pytest.approx(scale * (0.05 + 0.01 * width))


@pytest.mark.parametrize("cap", [1, 4, 64])
def test_of_models_beyond_the_budget_two_widths_are_measured_once(cap):
    pair, clock = fakes(scale=100.0)
    costs = measure_costs(pair, ServedRounds(cap), clock)
    assert pair.target.calls == 2
    assert pair.draft.calls == 1
    assert costs.verify_at(cap + 1) == pytest.approx(100 * (0.05 + 0.01 * (cap + 1)))


def test_sequences_that_were_not_measured_together_are_taken_to_share_nothing():
    pair, clock = fakes(scale=100.0)
    costs = measure_costs(pair, ServedRounds(4), clock)
    assert costs.shared_s(4, 4, ()) == pytest.approx(4 * costs.verify_at(1))
    assert costs.draft_more_s == pytest.approx(costs.draft_round_s + costs.draft_s)


def test_where_there_is_no_room_for_a_second_sequence_the_rest_is_measured():
    pair, clock = fakes()
    for model in (pair.target, pair.draft):
        rooms = [FakeCache(), FakeCache()] if model is pair.target else [FakeCache()]
        model.new_cache = lambda rooms=rooms: rooms.pop() if rooms else no_room()
    costs = measure_costs(pair, THREE, clock)
    assert costs.verify_at(1) == pytest.approx(0.06)
    assert costs.draft_more_s == pytest.approx(costs.draft_round_s + costs.draft_s)


def no_room():
    raise OutOfMemory("no room for a KV cache", remedy="Wait.")


def test_quick_models_are_measured_often():
    pair, clock = fakes(scale=0.01)
    measure_costs(pair, THREE, clock)
    assert pair.target.calls >= 4 * 8


def test_a_first_step_that_sets_something_up_is_timed_again():
    """There is no time for a second pass."""
    pair, clock = fakes(scale=1.5, busy_calls=range(1, 2))
    assert measure_costs(pair, ServedRounds(8), clock).verify_at(1) == pytest.approx(0.09)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
@pytest.mark.parametrize("trace", [False, True])
def test_the_served_path_is_measured(sampling, trace):
    pair, clock = fakes(scale=0.01)
    measure_costs(pair, ServedRounds(20, sampling=sampling, trace=trace), clock)
    for job in pair.target.jobs:
        assert job.rules.sampling == sampling
        assert job.trace == trace
        k = job.proposal.num_tokens
        drafted = 0 < k <= 8 and not sampling.greedy
        assert (job.proposal.q is not None) == drafted
        assert len(job.proposal.tokens) == k == len(job.accept_uniforms)
        assert not drafted or len(job.proposal.q) == k


def test_suffix_matches_are_verified_as_far_as_the_cache_holds_them():
    pair, clock = fakes(scale=0.01, room=30)
    costs = measure_costs(pair, ServedRounds(3, num_suffix_tokens=63), clock)
    assert [width for width, _ in costs.verify_s][-2:] == [24, 29]
    pair, clock = fakes(scale=0.01)
    assert measure_costs(pair, ServedRounds(3, num_suffix_tokens=63), clock).verify_s[-1][0] == 64


def test_a_proposal_is_timed_without_its_first_time():
    draft = FakeModel(clock := Clock(), busy_calls=range(1, 2))
    assert time_proposals(draft, 4, 3, clock=clock) == pytest.approx([0.083] * 3)
    assert draft.calls == 4


def test_it_leaves_no_room_behind_a_short_cache_unused():
    pair, clock = fakes()
    pair.target.new_cache = pair.draft.new_cache = lambda: FakeCache(max_tokens=40)
    assert measure_costs(pair, THREE, clock).draft_s == pytest.approx(0.020)


class TestTheFile:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))

    def test_the_second_start_measures_nothing(self):
        pair, clock = fakes()
        first = calibrated_costs(pair, THREE, FACTS, clock)
        calls = pair.target.calls
        assert calls > 0
        assert calibrated_costs(pair, THREE, FACTS, clock) == first
        assert pair.target.calls == calls

    def test_what_a_busy_moment_disturbed_is_measured_again(self, caplog):
        """While others are busy each step takes another time; the start after that finds it quiet."""
        caplog.set_level("INFO", "draftloop")
        pair, clock = fakes(busy_calls=range(2, 400, 3))
        pair.target.busy_calls = range(200)
        disturbed = calibrated_costs(pair, THREE, FACTS, clock)
        assert disturbed.verify_at(1) == pytest.approx(5 * 0.06)
        assert known_costs(THREE, FACTS) == disturbed
        quiet, clock = fakes()
        assert calibrated_costs(quiet, THREE, FACTS, clock).verify_at(1) == pytest.approx(0.06)
        calls = quiet.target.calls
        assert calibrated_costs(quiet, THREE, FACTS, clock).verify_at(1) == pytest.approx(0.06)
        assert quiet.target.calls == calls
        assert caplog.messages == [
            "measuring what rounds cost here (once for this pair)",
            "measuring what rounds cost here (again: something else was busy before)",
        ]

    def test_a_machine_that_is_never_quiet_measures_a_few_times_and_keeps_the_quickest(self):
        """Too slow for anything to be timed twice: whether it was quiet is not known."""
        costs = []
        for scale in (40.0, 30.0, 50.0, 20.0):
            pair, clock = fakes(scale=scale)
            costs.append(calibrated_costs(pair, THREE, FACTS, clock).verify_at(1))
            assert (pair.target.calls > 0) == (len(costs) <= MOST_TRIES)
        assert costs == pytest.approx([0.06 * scale for scale in (40, 30, 30, 30)])

    def test_what_was_measured_serves_every_smaller_cap_and_no_larger_one(self):
        pair, clock = fakes()
        assert known_costs(ServedRounds(6), FACTS) is None
        wide = calibrated_costs(pair, ServedRounds(6), FACTS, clock)
        calls = pair.target.calls
        for cap in range(1, 7):
            assert known_costs(ServedRounds(cap), FACTS) == wide
            assert calibrated_costs(pair, ServedRounds(cap), FACTS, clock) == wide
        assert pair.target.calls == calls
        assert known_costs(ServedRounds(7), FACTS) is None
        assert known_costs(ServedRounds(3, num_suffix_tokens=7), FACTS) is None
        wider = calibrated_costs(pair, ServedRounds(7), FACTS, clock)
        assert pair.target.calls > calls
        assert known_costs(ServedRounds(1), FACTS) == wider

    @pytest.mark.parametrize(
        "other", [ServedRounds(3, trace=True), ServedRounds(3, sampling=SAMPLED)], ids=["trace", "sampled"]
    )
    def test_another_way_of_serving_is_measured(self, other):
        pair, clock = fakes()
        calibrated_costs(pair, THREE, FACTS, clock)
        assert known_costs(other, FACTS) is None

    @pytest.mark.parametrize("change", [{"machine": "there"}, {"draft": "c"}])
    def test_other_facts_are_measured(self, change):
        pair, clock = fakes()
        calibrated_costs(pair, THREE, FACTS, clock)
        calls = pair.target.calls
        calibrated_costs(pair, THREE, {**FACTS, **change}, clock)
        assert pair.target.calls > calls

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: "",
            lambda text: text[: len(text) // 2],
            lambda text: "[1, 2]",
            lambda text: text.replace("draft_s", "drafts"),
            lambda text: json.dumps({**json.loads(text), "verify_s": [[2, 0.1], [1, 0.1]]}),
            lambda text: json.dumps({**json.loads(text), "verify_s": []}),
            lambda text: json.dumps({**json.loads(text), "verify_s": 3}),
            lambda text: json.dumps({**json.loads(text), "read_s": "much"}),
            lambda text: json.dumps({**json.loads(text), "draft_s": -1}),
            lambda text: text.replace('"draft_s": ', '"draft_s": NaN, "x": '),
            lambda text: json.dumps({**json.loads(text), "key": {"machine": "elsewhere"}}),
            lambda text: json.dumps({**json.loads(text), "format": 99}),
            lambda text: json.dumps({**json.loads(text), "widest": "wide"}),
            lambda text: json.dumps({**json.loads(text), "tries": None}),
        ],
    )
    def test_a_damaged_or_foreign_file_is_replaced(self, damage):
        pair, clock = fakes()
        first = calibrated_costs(pair, THREE, FACTS, clock)
        path = calibration_path({**FACTS, **THREE.facts})
        whole = path.read_text()
        path.write_text(damage(whole))
        calls = pair.target.calls
        again = calibrated_costs(pair, THREE, FACTS, clock)
        assert pair.target.calls > calls
        assert again.draft_s == pytest.approx(first.draft_s)
        assert json.loads(path.read_text())["format"] == json.loads(whole)["format"]
        calls = pair.target.calls
        calibrated_costs(pair, THREE, FACTS, clock)
        assert pair.target.calls == calls

    def test_where_nothing_can_be_written_it_is_measured_all_the_same(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "file" / "cache"))
        pair, clock = fakes()
        assert calibrated_costs(pair, THREE, FACTS, clock).draft_s == pytest.approx(0.020)
