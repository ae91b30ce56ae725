"""Calibration: what it measures of models that take time as they are told, and the file that remembers it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from draftloop.backends.base import NO_PROPOSAL
from draftloop.speculation.calibration import (
    BUDGET_S,
    calibrated_costs,
    calibration_path,
    measure_costs,
)
from draftloop.speculation.stream import Pair

if TYPE_CHECKING:
    from pathlib import Path

FACTS = {"machine": "here", "target": "a", "draft": "b"}


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


class FakeModel:
    """Takes `width_s[width]` for a verification; drafts for 20 ms a token and 3 ms a call; reads for 2 ms."""

    def __init__(
        self, clock: Clock, *, busy_calls: range = range(0), scale: float = 1.0, room: int = 512
    ) -> None:
        self.room = room
        self.clock, self.busy_calls, self.scale = clock, busy_calls, scale
        self.calls = 0

    def new_cache(self) -> FakeCache:
        return FakeCache(self.room)

    def prefill(self, batch) -> None:
        for job in batch:
            job.cache.read(len(job.tokens))

    def verify(self, batch) -> None:
        (job,) = batch
        width = job.proposal.num_tokens + 1
        job.cache.read(width)
        self._work(0.05 + 0.01 * width)

    def propose(self, batch):
        (job,) = batch
        job.cache.read(len(job.unread) + job.num_draft_tokens - 1)
        self._work(0.003 + 0.020 * job.num_draft_tokens + 0.002 * (len(job.unread) - 1))
        return [replace(NO_PROPOSAL, tokens=(0,) * job.num_draft_tokens)]

    def _work(self, seconds: float) -> None:
        self.calls += 1
        self.clock.now_s += self.scale * seconds * (5 if self.calls in self.busy_calls else 1)


def fakes(**options) -> tuple[Pair, Clock]:
    clock = Clock()
    return Pair(FakeModel(clock, **options), FakeModel(clock, **options)), clock


@pytest.mark.parametrize("cap", [1, 3, 8])
@pytest.mark.parametrize("busy", [range(0), range(4, 6)], ids=["quiet", "a busy moment"])
def test_the_costs_are_those_of_the_models(cap, busy):
    pair, clock = fakes(busy_calls=busy)
    costs = measure_costs(pair, cap, clock)
    assert [width for width, _ in costs.verify_s] == list(range(1, cap + 2))
    for width, seconds in costs.verify_s:
        assert seconds == pytest.approx(0.05 + 0.01 * width)
    assert costs.draft_s == pytest.approx(0.020)
    assert costs.draft_round_s == pytest.approx(0.003)
    assert costs.read_s == pytest.approx(0.002)


@pytest.mark.parametrize("cap", [1, 4])
@pytest.mark.parametrize("spare", [0, 1, 20])
def test_the_smallest_caches_that_settings_allow_are_measured(cap, spare):
    pair, clock = fakes(room=cap + 2 + spare)
    assert measure_costs(pair, cap, clock).read_s == pytest.approx(0.002)


def test_slow_models_are_measured_a_few_times_only():
    pair, clock = fakes(scale=20.0)
    measure_costs(pair, 3, clock)
    assert pair.target.calls == 4 * 3
    quick, other = fakes(scale=0.01)
    measure_costs(quick, 3, other)
    assert quick.target.calls > 4 * 3
    assert other.now_s < BUDGET_S


def test_it_leaves_no_room_behind_a_short_cache_unused():
    pair, clock = fakes()
    pair.target.new_cache = pair.draft.new_cache = lambda: FakeCache(max_tokens=40)
    assert measure_costs(pair, 3, clock).draft_s == pytest.approx(0.020)


class TestTheFile:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))

    def test_other_matches_are_another_calibration(self):
        pair, clock = fakes()
        assert calibrated_costs(pair, 3, FACTS, clock).verify_s[-1][0] == 4
        assert calibrated_costs(pair, 3, FACTS, clock, suffix_tokens=7).verify_s[-1][0] == 8

    def test_the_second_start_measures_nothing(self):
        pair, clock = fakes()
        first = calibrated_costs(pair, 3, FACTS, clock)
        calls = pair.target.calls
        assert calls > 0
        assert calibrated_costs(pair, 3, FACTS, clock) == first
        assert pair.target.calls == calls

    @pytest.mark.parametrize("change", [{"machine": "there"}, {"draft": "c"}])
    def test_other_facts_are_measured(self, change):
        pair, clock = fakes()
        calibrated_costs(pair, 3, FACTS, clock)
        calls = pair.target.calls
        calibrated_costs(pair, 3, {**FACTS, **change}, clock)
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
        ],
    )
    def test_a_damaged_or_foreign_file_is_replaced(self, damage):
        pair, clock = fakes()
        first = calibrated_costs(pair, 3, FACTS, clock)
        path = calibration_path({**FACTS, "num_draft_tokens": "3", "suffix_tokens": "0"})
        whole = path.read_text()
        path.write_text(damage(whole))
        calls = pair.target.calls
        again = calibrated_costs(pair, 3, FACTS, clock)
        assert pair.target.calls > calls
        assert again.draft_s == pytest.approx(first.draft_s)
        assert json.loads(path.read_text())["format"] == json.loads(whole)["format"]
        calls = pair.target.calls
        calibrated_costs(pair, 3, FACTS, clock)
        assert pair.target.calls == calls

    def test_where_nothing_can_be_written_it_is_measured_all_the_same(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "file" / "cache"))
        pair, clock = fakes()
        assert calibrated_costs(pair, 3, FACTS, clock).draft_s == pytest.approx(0.020)


def test_widths_of_suffix_matches_are_measured_as_far_as_the_cache_holds() -> None:
    clock = Clock()
    for room, widest in ((512, 21), (12, 11)):
        pair = Pair(FakeModel(clock, room=room), FakeModel(clock))  # type: ignore[arg-type]
        costs = measure_costs(pair, 3, clock, suffix_tokens=20)
        assert costs.verify_s[-1] == (widest, pytest.approx(0.05 + 0.01 * widest))
        assert {1, 2, 3, 4} <= {width for width, _ in costs.verify_s}
