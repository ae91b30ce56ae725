"""Adapters: which one is active, and what a promotion or a revert changes together."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from storage_samples import OTHER_PAIR, PAIR, add_promoted, failure, make_adapter, make_request

from draftloop.errors import InputError, StorageError
from draftloop.storage.records import AdapterStatus
from draftloop.storage.store import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    times = iter(range(1000, 2000))
    with open_store(tmp_path, max_megabytes=10, clock=lambda: float(next(times))) as opened:
        yield opened


def active(store: Store) -> str | None:
    record = store.adapters.active(PAIR)
    return None if record is None else record.name


def status(store: Store, name: str) -> AdapterStatus:
    record = store.adapters.get(name)
    assert record is not None
    return record.status


def trained_by(store: Store) -> list[str | None]:
    return [one.trained_by for one in store.requests.list(PAIR)]


def test_an_adapter_comes_back_as_it_was(store: Store) -> None:
    run = store.runs.start(PAIR, None, {})
    first = make_adapter("a0001", run=run)
    second = make_adapter("a0002", "a0001", status=AdapterStatus.PROMOTED, form="fused8")
    for record in (first, second):
        store.adapters.add(record)
    assert store.adapters.get("a0001") == first
    assert store.adapters.list(PAIR) == [first, second]
    assert store.adapters.list(OTHER_PAIR) == []
    assert store.adapters.get("a0003") is None
    assert active(store) is None
    assert store.adapters.generation(PAIR) == 0


def test_names_go_on_after_the_last_of_any_pair(store: Store) -> None:
    assert store.adapters.next_name() == "a0001"
    store.adapters.add(make_adapter("a0001", pair=OTHER_PAIR))
    assert store.adapters.next_name() == "a0002"
    store.adapters.add(make_adapter("a9999"))
    store.adapters.add(make_adapter("x77777"))
    assert store.adapters.next_name() == "a10000"
    store.adapters.add(make_adapter("a10000"))
    assert store.adapters.next_name() == "a10001"
    assert [one.name for one in store.adapters.list(PAIR)] == ["a9999", "x77777", "a10000"]


@pytest.mark.parametrize("wrong", [{"name": "a0001"}, {"name": "a0002", "parent": "a0009"}])
def test_an_adapter_that_cannot_be_is_refused(store: Store, wrong: dict[str, str]) -> None:
    store.adapters.add(make_adapter("a0001"))
    with pytest.raises(StorageError, match=f"adapter {wrong['name']} "):
        store.adapters.add(make_adapter(**wrong))
    assert len(store.adapters.list(PAIR)) == 1


def test_figures_are_finite(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.adapters.add(make_adapter("a0001", metrics={"alpha": math.nan}))
    assert store.adapters.list(PAIR) == []


def test_a_promotion_says_all_of_it(store: Store) -> None:
    ids = [store.requests.add(failure(seed)) for seed in range(3)]
    store.adapters.add(make_adapter("a0001"))
    store.adapters.promote("a0001", trained_request_ids=ids[:2], reason="tau +9 %")
    promoted = store.adapters.active(PAIR)
    assert promoted == make_adapter("a0001", status=AdapterStatus.PROMOTED, reason="tau +9 %")
    assert trained_by(store) == ["a0001", "a0001", None]
    (event,) = store.adapters.history(PAIR)
    assert (event.adapter, event.reason, event.request_id) == ("a0001", "tau +9 %", ids[-1])
    assert (event.pair, event.created_s) == (PAIR, 1000.0)
    assert event.generation == store.adapters.generation(PAIR)
    assert store.adapters.active(OTHER_PAIR) is None
    assert store.adapters.history(OTHER_PAIR) == []


def test_a_promotion_that_breaks_off_changes_nothing(store: Store) -> None:
    ids = [store.requests.add(failure(seed)) for seed in range(3)]
    add_promoted(store, "a0001")
    store.adapters.add(make_adapter("a0002", "a0001"))
    before = store.adapters.list(PAIR), trained_by(store), store.adapters.history(PAIR)

    def breaks_off() -> Iterator[int]:
        yield ids[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.adapters.promote("a0002", trained_request_ids=breaks_off(), reason="better")
    assert (store.adapters.list(PAIR), trained_by(store), store.adapters.history(PAIR)) == before


def test_a_promotion_without_a_time_changes_nothing(tmp_path: Path) -> None:
    def no_clock() -> float:
        raise OSError("it stands still")

    with open_store(tmp_path, max_megabytes=10, clock=no_clock) as store:
        identity = store.requests.add(failure(0))
        store.adapters.add(make_adapter("a0001"))
        # The activation is the last of the three changes: the two before it are taken back.
        with pytest.raises(OSError, match="stands still"):
            store.adapters.promote("a0001", trained_request_ids=[identity], reason="better")
        assert status(store, "a0001") is AdapterStatus.REJECTED
        assert trained_by(store) == [None]


def test_the_generation_grows_with_every_change_and_with_nothing_else(store: Store) -> None:
    add_promoted(store, "a0001", "a0002")
    seen = [store.adapters.generation(PAIR)]
    for name in ("a0001", None, "a0002"):
        store.adapters.activate(PAIR, name)
        assert active(store) == name
        seen.append(store.adapters.generation(PAIR))
    assert seen == sorted(set(seen))
    store.adapters.activate(PAIR, "a0002")
    store.adapters.set_status("a0001", AdapterStatus.REJECTED, "on second thoughts")
    store.requests.add(make_request())
    assert store.adapters.generation(PAIR) == seen[-1]
    assert status(store, "a0001") is AdapterStatus.REJECTED


def test_activating_by_hand_moves_the_pointer_only(store: Store) -> None:
    add_promoted(store, "a0001", "a0002")
    before = store.adapters.list(PAIR)
    store.adapters.activate(PAIR, "a0001")
    store.adapters.activate(PAIR, None, reason="compare")
    assert store.adapters.list(PAIR) == before
    assert [(one.adapter, one.reason) for one in store.adapters.history(PAIR)] == [
        ("a0001", "better"),
        ("a0002", "better"),
        ("a0001", "chosen by hand"),
        (None, "compare"),
    ]


def test_a_revert_brings_the_parent_back_and_what_was_learnt_to_be_learnt_again(store: Store) -> None:
    ids = [store.requests.add(failure(seed)) for seed in range(4)]
    store.adapters.add(make_adapter("a0001"))
    store.adapters.promote("a0001", trained_request_ids=ids[:2], reason="better")
    store.adapters.add(make_adapter("a0002", "a0001"))
    store.adapters.promote("a0002", trained_request_ids=ids[1:3], reason="better")
    assert trained_by(store) == ["a0001", "a0001", "a0002", None]

    restored = store.adapters.revert(PAIR, "alpha fell")
    assert restored is not None
    assert (restored.name, active(store)) == ("a0001", "a0001")
    assert status(store, "a0002") is AdapterStatus.REVERTED
    assert trained_by(store) == ["a0001", "a0001", None, None]

    assert store.adapters.revert(PAIR, "alpha fell again") is None
    assert active(store) is None
    assert trained_by(store) == [None] * 4
    assert [one.adapter for one in store.adapters.history(PAIR)] == ["a0001", "a0002", "a0001", None]
    with pytest.raises(InputError, match="no adapter of org/draft is active"):
        store.adapters.revert(PAIR, "once more")


def test_a_revert_passes_over_an_ancestor_that_was_reverted(store: Store) -> None:
    add_promoted(store, "a0001", "a0002", "a0003")
    store.adapters.set_status("a0002", AdapterStatus.REVERTED, "alpha fell")
    restored = store.adapters.revert(PAIR, "alpha fell")
    assert restored is not None
    assert restored.name == "a0001"


def test_a_revert_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    times = [1.0]
    with open_store(tmp_path, max_megabytes=10, clock=times.pop) as store:
        identity = store.requests.add(failure(0))
        store.adapters.add(make_adapter("a0001"))
        store.adapters.promote("a0001", trained_request_ids=[identity], reason="better")
        with pytest.raises(IndexError):
            store.adapters.revert(PAIR, "alpha fell")
        assert status(store, "a0001") is AdapterStatus.PROMOTED
        assert active(store) == "a0001"
        assert trained_by(store) == ["a0001"]


def test_unknown_names_and_other_pairs_adapters_are_refused(store: Store) -> None:
    store.adapters.add(make_adapter("a0001", pair=OTHER_PAIR))
    for call in (
        lambda: store.adapters.promote("a0009", reason="better"),
        lambda: store.adapters.activate(PAIR, "a0009"),
        lambda: store.adapters.set_status("a0009", AdapterStatus.REJECTED, "worse"),
    ):
        with pytest.raises(InputError, match="'a0009'"):
            call()
    with pytest.raises(InputError, match="is for the draft org/other-draft"):
        store.adapters.activate(PAIR, "a0001")
    assert active(store) is None


def test_what_is_done_in_one_transaction_is_taken_back_together(store: Store) -> None:
    run = store.runs.start(PAIR, None, {})

    def conclude() -> None:
        with store.transaction():
            store.adapters.add(make_adapter("a0001", run=run))
            store.adapters.promote("a0001", reason="better")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conclude()
    assert store.adapters.list(PAIR) == []
    assert active(store) is None

    with store.transaction():
        store.adapters.add(make_adapter("a0001", run=run))
        with pytest.raises(StorageError):
            store.adapters.add(make_adapter("a0001"))
        store.adapters.promote("a0001", reason="better")
    assert active(store) == "a0001"


class Lineage(RuleBasedStateMachine):
    """Whatever is promoted, chosen and reverted: the store agrees with a model of a few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = open_store(Path(self.folder.name), max_megabytes=10)
        self.ids = [self.store.requests.add(failure(seed)) for seed in range(4)]
        self.parents: dict[str, str | None] = {}
        self.promoted: set[str] = set()
        self.trained: dict[int, str | None] = dict.fromkeys(self.ids)
        self.active: list[str | None] = [None]

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def point_to(self, name: str | None) -> None:
        if self.active[-1] != name:
            self.active.append(name)

    @rule(learnt=st.sets(st.integers(0, 3)), promote=st.booleans())
    def train(self, learnt: set[int], promote: bool) -> None:
        name = self.store.adapters.next_name()
        parent = self.active[-1]
        self.store.adapters.add(make_adapter(name, parent))
        self.parents[name] = parent
        if promote:
            ids = [self.ids[one] for one in learnt]
            self.store.adapters.promote(name, trained_request_ids=ids, reason="better")
            self.promoted.add(name)
            self.point_to(name)
            for one in ids:
                self.trained[one] = self.trained[one] or name

    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([None, *self.parents]))
        self.store.adapters.activate(PAIR, name)
        self.point_to(name)

    @precondition(lambda self: self.active[-1] is not None)
    @rule()
    def revert(self) -> None:
        name = self.active[-1]
        self.store.adapters.revert(PAIR, "alpha fell")
        self.promoted.discard(name)
        self.trained = {one: None if by == name else by for one, by in self.trained.items()}
        parent = self.parents[name]
        while parent is not None and parent not in self.promoted:
            parent = self.parents[parent]
        self.point_to(parent)

    @invariant()
    def agrees(self) -> None:
        assert active(self.store) == self.active[-1]
        assert [one.adapter for one in self.store.adapters.history(PAIR)] == self.active[1:]
        assert {one.id: one.trained_by for one in self.store.requests.list(PAIR)} == self.trained
        promoted = {
            one.name for one in self.store.adapters.list(PAIR) if one.status is AdapterStatus.PROMOTED
        }
        assert promoted == self.promoted


TestLineage = Lineage.TestCase
TestLineage.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
