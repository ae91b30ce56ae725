"""A store's content as it may look after some weeks: 400 requests of three domains, three judged runs.

Contract: two adapters are promoted, one is rejected, one is taken back; the same call gives the same
content. `sample_requests` and its neighbours are plain records; `write_store` writes them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.reporting.mistakes import count_mistakes
from draftloop.reporting.stored import Stored
from draftloop.storage.records import (
    AdapterRecord,
    AdapterStatus,
    PairKey,
    RequestRecord,
    RequestSummary,
    RunPoint,
    RunStatus,
    TraceRows,
)
from draftloop.storage.store import open_store
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from draftloop.storage.store import Store

PAIR = PairKey("package:qwen2.5-coder-1.5b-instruct", "package:qwen2.5-coder-0.5b-instruct")
BEGIN_S = 1_760_000_000.0
STEP_S = 2400.0
NUM_DRAFT_TOKENS = 4

DOMAINS = {"ship's log": 0.5, "code": 0.3, "system 9f86d081": 0.2}
"""Each domain's share of the traffic."""

LEVELS = {
    ("ship's log", None): 0.74, ("ship's log", "a0001"): 0.83, ("ship's log", "a0003"): 0.80,
    ("code", None): 0.88, ("code", "a0001"): 0.90, ("code", "a0003"): 0.84,
    ("system 9f86d081", None): 0.79, ("system 9f86d081", "a0001"): 0.82, ("system 9f86d081", "a0003"): 0.79,
}  # fmt: skip
"""Alpha of each domain under each adapter; the second promotion turns out to be a loss."""

SERVED = ((150, None), (270, "a0001"), (330, "a0003"), (400, "a0001"))
"""Who served: up to that request, that adapter."""

REVERTED_AFTER = 330
REVERT_REASON = "Alpha fell to 0.79 over 60 requests; before the promotion it was 0.83."

SWAPS = ((11, 25), (11, 262), (262, 11), (13, 279), (279, 284), (220, 198), (198, 271), (60, 397), (1096, 0))
"""Proposed and wanted token ids, the frequent ones first."""


@dataclass(frozen=True, slots=True)
class SampleRun:
    """A training run: who it made, what the gate said, its curve."""

    parent: str | None
    adapter: str
    after_request: int
    status: RunStatus
    result: dict[str, Any]
    points: Sequence[RunPoint]


def sample_requests(
    count: int = 400, *, seed: int = 0, swaps: Sequence[tuple[int, int]] = SWAPS
) -> list[RequestRecord]:
    """The requests, oldest first; the first 12 asked the target alone."""
    random = np.random.default_rng(seed)
    return [_request(random, number, swaps) for number in range(1, count + 1)]


def sample_runs() -> list[SampleRun]:
    """The three runs, oldest first."""
    random = np.random.default_rng(1)
    return [
        _run(random, None, "a0001", 150, RunStatus.PROMOTED, lift=0.085, spread=0.05),
        _run(random, "a0001", "a0002", 210, RunStatus.REJECTED, lift=0.002, spread=0.07),
        _run(random, "a0001", "a0003", 270, RunStatus.PROMOTED, lift=0.03, spread=0.05),
    ]


def adapter_of(run: SampleRun, run_id: int, created_s: float) -> AdapterRecord:
    """The adapter that a run made, as the gate left it."""
    promoted = run.status is RunStatus.PROMOTED
    return AdapterRecord(
        name=run.adapter,
        pair=PAIR,
        parent=run.parent,
        created_s=created_s,
        status=AdapterStatus.PROMOTED if promoted else AdapterStatus.REJECTED,
        form="unfused",
        run=run_id,
        reason=run.result["reason"],
        metrics={key: value for key, value in run.result.items() if key not in ("held_out", "domains")},
    )


def time_of(request: int) -> float:
    """When a request ended."""
    return BEGIN_S + STEP_S * request


def sample_recipe() -> dict[str, Any]:
    """What reproduces a run."""
    return {
        "settings": {"learning_rate": 3e-4, "lora": {"rank": 8, "target_modules": ["q_proj", "v_proj"]}},
        "threshold": 0.62,
        "failures": list(range(3, 150, 3)),
        "replay": [],
        "parent": None,
        "facts": {"draft_sha256": "1d9614638d18024d", "torch": "2.13.0", "device": "cpu"},
    }


def write_store(directory: Path, requests: Sequence[RequestRecord] | None = None) -> None:
    """Write everything into a new store, in the order in which it happened and at the time when it did."""
    now_s = [BEGIN_S]
    runs = {run.after_request: run for run in sample_runs()}
    with open_store(directory, max_megabytes=1000, clock=lambda: now_s[0]) as store:
        for number, request in enumerate(sample_requests() if requests is None else requests, start=1):
            now_s[0] = request.created_s
            store.requests.add(request)
            if number in runs:
                now_s[0] += 60
                run_id = _write_run(store, runs[number], now_s)
                _write_adapter(store, runs[number], run_id, now_s[0])
            if number == REVERTED_AFTER:
                store.adapters.revert(PAIR, REVERT_REASON)


def _write_run(store: Store, run: SampleRun, now_s: list[float]) -> int:
    run_id = store.runs.start(PAIR, run.parent, sample_recipe())
    for point in run.points:
        store.runs.add_point(run_id, point)
    now_s[0] += 700
    store.runs.finish(run_id, run.status, run.result)
    return run_id


def _write_adapter(store: Store, run: SampleRun, run_id: int, created_s: float) -> None:
    adapter = adapter_of(run, run_id, created_s)
    store.adapters.add(replace(adapter, status=AdapterStatus.REJECTED))
    if run.status is RunStatus.PROMOTED:
        learnt = range(3, run.after_request, 3)
        store.adapters.promote(adapter.name, trained_request_ids=learnt, reason=adapter.reason)


def summary_of(request: RequestRecord, number: int) -> RequestSummary:
    """A request as the store lists it; every fifth is held out."""
    same = {name: getattr(request, name) for name in RequestSummary.__slots__ if hasattr(request, name)}
    return RequestSummary(
        **same,
        id=number,
        held_out=number % 5 == 0,
        trained_by=None,
        num_prompt_tokens=len(request.prompt_tokens),
        num_answer_tokens=len(request.answer_tokens),
        temperature=request.sampling.temperature,
        stored_bytes=220 * len(request.answer_tokens),
    )


def sample_stored(count: int = 400) -> Stored:
    """What `read_stored` would give, without a database: requests and nothing learnt."""
    records = sample_requests(count)
    requests = [summary_of(one, number) for number, one in enumerate(records, start=1)]
    return Stored(
        pair=PAIR,
        requests=requests,
        drafted=[one for one in requests if one.drafted_tokens],
        adapters=[],
        active=None,
        history=[],
        runs=[],
        num_runs=0,
        points={},
        mistakes=count_mistakes(records, most=20),
        other_pairs={},
    )


def _request(random: np.random.Generator, number: int, swaps: Sequence[tuple[int, int]]) -> RequestRecord:
    domain = str(random.choice(list(DOMAINS), p=list(DOMAINS.values())))
    adapter = next(name for last, name in SERVED if number <= last or last == SERVED[-1][0])
    drafts = number > 12
    alpha = float(np.clip(random.normal(LEVELS[domain, adapter], 0.07), 0.3, 0.99))
    length = int(random.integers(25, 140))
    rounds: list[tuple[int, bool]] = []
    emitted = 0
    while emitted < length:
        budget = min(NUM_DRAFT_TOKENS, length - emitted - 1) if drafts else 0
        misses = np.flatnonzero(random.random(budget) > alpha)
        accepted = int(misses[0]) if len(misses) else budget
        rounds.append((accepted, accepted < budget))
        emitted += accepted + 1
    drafted = sum(min(NUM_DRAFT_TOKENS, length - at - 1) for at in _starts(rounds)) if drafts else 0
    tested = sum(accepted + rejected for accepted, rejected in rounds)
    traces, answer = _traces(random, rounds, swaps, drafts=drafts)
    return RequestRecord(
        created_s=time_of(number),
        pair=PAIR,
        adapter=adapter,
        domain=domain,
        source="collect" if number <= 150 else "chat",
        key=f"prompt {number}" if number <= 150 else None,
        split_key=hashlib.sha256(str(number).encode()).hexdigest(),
        prompt_tokens=np.arange(40, dtype=np.int32),
        answer_tokens=answer,
        sampling=Sampling(temperature=0.7, top_p=0.9),
        min_tokens=1,
        num_draft_tokens=NUM_DRAFT_TOKENS if drafts else 0,
        seed=number,
        finish_reason="stop",
        rounds=len(rounds),
        drafted_tokens=drafted,
        accepted_tokens=sum(accepted for accepted, _ in rounds),
        tested_tokens=tested,
        alpha_sum=tested * alpha,
        prompt_s=1.2,
        decode_s=0.3 * len(rounds),
        traces=traces,
    )


def _starts(rounds: Sequence[tuple[int, bool]]) -> list[int]:
    """The place of each round's first token."""
    return [sum(accepted + 1 for accepted, _ in rounds[:index]) for index in range(len(rounds))]


def _traces(
    random: np.random.Generator,
    rounds: Sequence[tuple[int, bool]],
    swaps: Sequence[tuple[int, int]],
    *,
    drafts: bool,
) -> tuple[TraceRows, np.ndarray[Any, Any]]:
    """Rows as the rounds left them: accepted tokens, then a recovered, a bonus or the target's own."""
    weights = 1 / np.arange(1, len(swaps) + 1)
    index, kinds, proposed, answer = [], [], [], []
    for number, (accepted, rejected) in enumerate(rounds):
        tokens = random.choice([swap[0] for swap in swaps], size=accepted).tolist()
        swap = swaps[int(random.choice(len(swaps), p=weights / weights.sum()))]
        index += [number] * (accepted + 1)
        kinds += [0] * accepted + [1 if rejected else 2 if drafts else 3]
        proposed += [*tokens, swap[0] if rejected else -1]
        answer += [*tokens, swap[1]]
    rows = len(answer)
    traces = TraceRows(
        round_index=np.array(index, np.int32),
        kinds=np.array(kinds, np.uint8),
        draft_ids=np.array(proposed, np.int32),
        draft_probs=np.where(np.array(proposed) >= 0, random.uniform(0.3, 0.9, rows), 0).astype(np.float32),
        top_ids=np.tile(np.arange(32, dtype=np.int32), (rows, 1)),
        top_logprobs=np.tile(np.linspace(-0.5, -9, 32, dtype=np.float32), (rows, 1)),
        tail_mass=np.full(rows, 0.01, np.float32),
    )
    return traces, np.array(answer, np.int32)


def _run(
    random: np.random.Generator,
    parent: str | None,
    adapter: str,
    after_request: int,
    status: RunStatus,
    *,
    lift: float,
    spread: float,
) -> SampleRun:
    held_out = []
    for place in range(after_request // 5):
        domain = str(random.choice(list(DOMAINS), p=list(DOMAINS.values())))
        before = float(np.clip(random.normal(3.1 + 0.5 * (domain == "code"), 0.35), 1.2, 5))
        after = float(np.clip(before * (1 + random.normal(lift, spread)), 1.0, 5))
        held_out.append(
            {
                "request": place * 5 + 3, "domain": domain, "rows": 80,
                "tau_before": before, "tau_after": after,
                "alpha_before": before / 5 + 0.2, "alpha_after": after / 5 + 0.2,
            }
        )  # fmt: skip
    promoted = status is RunStatus.PROMOTED
    reason = (
        f"Tokens a second rise by {100 * lift:.1f} % on {len(held_out)} held-out requests."
        if promoted
        else f"The gain of {100 * lift:.1f} % on {len(held_out)} held-out requests may be chance: its 95 % "
        "interval reaches below zero."
    )
    result = {
        "status": status.value,
        "reason": reason,
        "adapter": adapter,
        "gain": lift,
        "gain_ci95": [lift - 0.019, lift + 0.021],
        "alpha_before": 0.804, "alpha_after": 0.804 + lift / 2,
        "tau_before": 3.11, "tau_after": 3.11 * (1 + lift),
        "domains": {name: _means([row for row in held_out if row["domain"] == name]) for name in DOMAINS},
        "held_out": held_out,
    }  # fmt: skip
    return SampleRun(parent, adapter, after_request, status, result, _points(random, lift, skipped=(41, 77)))


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    keys = ("alpha_before", "alpha_after", "tau_before", "tau_after")
    means = {key: float(np.mean([row[key] for row in rows])) for key in keys}
    return {"requests": len(rows), "rows": 80 * len(rows), **means}


def _points(random: np.random.Generator, lift: float, *, skipped: Sequence[int]) -> list[RunPoint]:
    total, peak = 120, 3e-4
    points = [RunPoint(0, 0.0, None, None, None, 0.801)]
    for step in range(1, total + 1):
        finite = step not in skipped
        rate = peak * min(step / 10, 0.5 * (1 + np.cos(np.pi * max(0, step - 10) / 110)))
        loss = float(0.9 * np.exp(-step / 50) + 0.55 + random.normal(0, 0.05))
        norm = float(random.uniform(0.4, 1.6)) if finite else None
        points.append(RunPoint(step, step / 40, loss if finite else None, float(rate), norm, None))
        if step % 20 == 0:
            gained = lift / 2 * (1 - np.exp(-step / 40)) + float(random.normal(0, 0.002))
            points.append(RunPoint(step, step / 40, None, None, None, 0.801 + gained))
    return points
