"""Requests and adapters to store, and what it means that two requests are the same."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.storage.records import (
    AdapterRecord,
    AdapterStatus,
    PairKey,
    RequestRecord,
    TraceRows,
)
from draftloop.types import TRACE_TOP_TOKENS, Sampling

if TYPE_CHECKING:
    from draftloop.storage.store import Store

PAIR = PairKey("org/target", "org/draft")
OTHER_PAIR = PairKey("org/target", "org/other-draft")


def make_traces(rows: int, seed: int = 0) -> TraceRows:
    """Random rows whose log-probabilities need no more than 16 bits."""
    random = np.random.Generator(np.random.PCG64(seed))
    logprobs = np.sort(-random.exponential(3, (rows, TRACE_TOP_TOKENS)))[:, ::-1]
    return TraceRows(
        round_index=np.sort(random.integers(0, rows + 1, rows)).astype(np.int32),
        kinds=random.integers(0, 4, rows).astype(np.uint8),
        draft_ids=random.integers(-1, 150_000, rows).astype(np.int32),
        draft_probs=random.random(rows).astype(np.float32),
        top_ids=random.integers(0, 150_000, (rows, TRACE_TOP_TOKENS)).astype(np.int32),
        top_logprobs=logprobs.astype(np.float16).astype(np.float32),
        tail_mass=random.random(rows).astype(np.float32),
    )


def make_request(*, rows: int = 3, prompt: int = 4, seed: int = 0, **changed: Any) -> RequestRecord:
    """One request; `changed` are fields of its record."""
    random = np.random.Generator(np.random.PCG64(seed))
    record = RequestRecord(
        created_s=1_700_000_000.25 + seed,
        pair=PAIR,
        adapter=None,
        domain="law",
        source="generate",
        key=None,
        split_key=f"split {seed}",
        prompt_tokens=random.integers(0, 150_000, prompt).astype(np.int32),
        answer_tokens=random.integers(0, 150_000, rows).astype(np.int32),
        sampling=Sampling(0.7, 0.9, 40, 0.05),
        min_tokens=1,
        num_draft_tokens=4,
        seed=seed,
        finish_reason="stop",
        rounds=2,
        drafted_tokens=8,
        accepted_tokens=2,
        tested_tokens=4,
        alpha_sum=1.5,
        prompt_s=0.25,
        decode_s=0.5,
        traces=make_traces(rows, seed),
    )
    return dataclasses.replace(record, **changed)


def failure(seed: int, **changed: Any) -> RequestRecord:
    """A request with an acceptance rate of 0.25."""
    return make_request(seed=seed, **changed)


def replay(seed: int, **changed: Any) -> RequestRecord:
    """A request with an acceptance rate of 1."""
    return make_request(seed=seed, accepted_tokens=8, **changed)


def make_adapter(name: str, parent: str | None = None, **changed: Any) -> AdapterRecord:
    """One adapter as the gate first writes it down."""
    record = AdapterRecord(
        name=name,
        pair=PAIR,
        parent=parent,
        created_s=1_700_000_100.5,
        status=AdapterStatus.REJECTED,
        form="unfused",
        run=None,
        reason="not judged yet",
        metrics={"alpha": 0.75, "domains": {"law": [1, 2]}, "note": "é"},
    )
    return dataclasses.replace(record, **changed)


def add_promoted(store: Store, *names: str) -> None:
    """A chain of adapters, each the parent of the next, each promoted; the last is active."""
    parent = None
    for name in names:
        store.adapters.add(make_adapter(name, parent))
        store.adapters.promote(name, reason="better")
        parent = name


def assert_same(left: RequestRecord, right: RequestRecord) -> None:
    """Field by field, arrays with their types."""
    for field in dataclasses.fields(RequestRecord):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        if field.name == "traces":
            for column in dataclasses.fields(TraceRows):
                _assert_equal(column.name, getattr(ours, column.name), getattr(theirs, column.name))
        elif isinstance(ours, np.ndarray):
            _assert_equal(field.name, ours, theirs)
        else:
            assert ours == theirs, field.name


def _assert_equal(name: str, left: np.ndarray, right: np.ndarray) -> None:
    assert left.dtype == right.dtype, name
    assert left.shape == right.shape, name
    assert np.array_equal(left, right), name
