"""What the gate is for: adapters that harm are trained for real, on toys, and refused.

Each refusal stands beside its control: the same set-up with the one thing put right raises alpha on the
requests that the gate judges by, and is promoted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import pupils
from draftloop.learning.circle import learn
from draftloop.learning.deployment import load_deployed
from draftloop.learning.selection import select
from draftloop.storage.records import AdapterStatus
from pupils import Watched

pytest.importorskip("torch")

WIDE = {"training__lora__rank": 64, "training__lora__alpha": 2048}
"""A toy has few weights to move: with these a rate means to it about what it means to a real draft."""


@pytest.fixture(autouse=True)
def _steady_costs(monkeypatch):
    pupils.steady_costs(monkeypatch)


def shuffled(record, random):
    """Each row is said to have the target's distribution of another row."""
    order = random.permutation(len(record.answer_tokens))
    rows = record.traces
    traces = replace(
        rows,
        top_ids=rows.top_ids[order],
        top_logprobs=rows.top_logprobs[order],
        tail_mass=rows.tail_mass[order],
    )
    return replace(record, traces=traces)


def copy_requests(store, other, pair, config, *, shuffle):
    """Store the same requests once more; those that the gate judges by always as they were."""
    random, gate = np.random.default_rng(0), select(store, pair, config).gate
    for one in store.requests.list(pair):
        (record,) = store.requests.load([one.id])
        other.requests.add(shuffled(record, random) if shuffle and one.id not in gate else record)
    assert select(other, pair, config).gate == gate


@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffled_targets(classroom, tmp_path, shuffle):
    room = pupils.Elsewhere(tmp_path / "elsewhere")
    with classroom.store() as store, room.store() as other:
        copy_requests(store, other, room.pair, room.config(), shuffle=shuffle)
        outcome = learn(room.school(other), Watched(), lambda: False)
        if shuffle:
            assert outcome.alpha_after < outcome.alpha_before - 0.05
            assert_refused(room, other, outcome)
        else:
            assert outcome.alpha_after > outcome.alpha_before + 0.1
            assert_promoted(room, other, outcome)


@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_the_learning_rate(classroom, rate):
    """1e-2 falls; the best checkpoint is then the start, which gains nothing."""
    watched = Watched()
    with classroom.store() as store:
        school = classroom.school(store, training__learning_rate=rate, **WIDE)
        outcome = learn(school, watched, lambda: False)
        if rate == 1e-2:
            assert max(watched.alphas[1:]) < watched.alphas[0]
            assert outcome.reason.startswith("No checkpoint beat the start")
            assert outcome.tau_after == pytest.approx(outcome.tau_before)
            assert_refused(classroom, store, outcome)
        else:
            assert outcome.alpha_after > outcome.alpha_before + 0.1
            assert_promoted(classroom, store, outcome)


def assert_refused(room, store, outcome):
    """It is kept and told of, and changes nothing."""
    assert outcome.status == "rejected"
    record = store.adapters.get(outcome.adapter)
    assert (record.status, record.reason) == (AdapterStatus.REJECTED, outcome.reason)
    assert load_deployed(store, room.data, outcome.adapter).lora.modules
    assert store.adapters.active(room.pair) is None
    assert not any(one.trained_by for one in store.requests.list(room.pair))
    assert not select(store, room.pair, room.config()).ready_again


def assert_promoted(room, store, outcome):
    assert outcome.status == "promoted", outcome.reason
    assert store.adapters.active(room.pair).name == outcome.adapter
    assert not outcome.reason.startswith("No checkpoint")
