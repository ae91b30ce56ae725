"""What the page shows, as plain JSON: the worker's state, the store's figures, one conversation.

Contract: reads; every figure comes from `reporting` or from who measured it. What is undefined is None. Must
not know HTTP.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from draftloop.errors import InputError
from draftloop.learning.selection import select
from draftloop.loading import pair_of
from draftloop.reporting.conversation import answer_preview, answer_tokens_of, prompt_preview, turns_of
from draftloop.reporting.figures import (
    alpha_of,
    drafted_of,
    rolling_alpha,
    rolling_tau,
    rolling_tokens_per_s,
    rolling_window,
    tau_of,
    tokens_per_s_of,
)
from draftloop.reporting.overview import marks_of, training_state
from draftloop.reporting.trainings import adapter_views, run_views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.reporting.figures import RollingPoint
    from draftloop.server.service import Service
    from draftloop.storage.records import RequestSummary

MAX_REQUESTS = 500
"""Requests in the charts: the newest."""
PAGE_REQUESTS = 20
"""Conversations in one page of the list."""
NEWEST_RUNS = 5


def state_of(service: Service) -> dict[str, Any]:
    """How things stand now; cheap enough for once a second.

    `answered` and `learnt` change with what the slower parts of the page show.
    """
    snapshot = service.worker.snapshot()
    counts = snapshot.counts
    learning = None if service.learner is None else service.learner.state()
    return {
        "models": {"target": service.config.models.target.name, "draft": _draft_name(service)},
        "storing": _stores(service),
        "status": "ready" if snapshot.ready else "shutting down" if snapshot.draining else "broken",
        "active": snapshot.active,
        "queued": snapshot.queued,
        "worn": snapshot.adapter,
        "tokens_per_s": counts.tokens_per_s,
        "mean_tokens_per_s": counts.mean_tokens_per_s,
        "alpha": counts.recent.alpha,
        "tau": counts.recent.tau,
        "recent_rounds": counts.recent.rounds,
        "drafted_per_round": counts.drafted_per_round,
        "requests": sum(counts.requests.values()),
        "tokens": counts.total.completion_tokens,
        "kv_bytes": snapshot.kv_bytes + snapshot.prefix_cache_bytes,
        "learning": None if learning is None else {**asdict(learning), "enabled": learning.enabled},
        "answered": _answered(service),
        "learnt": _learnt(service),
    }


def history_of(service: Service) -> dict[str, Any]:
    """Tokens a second, alpha and tau of the newest requests with drafts, and what happened among them."""
    pair = pair_of(service.config)
    if service.store is not None and _stores(service):
        requests = service.store.requests.list(pair, newest=MAX_REQUESTS)
    else:
        requests = [] if service.session is None else service.session.requests()
    drafted = drafted_of(requests)
    return {
        "requests": len(requests),
        "window": rolling_window(len(drafted)),
        "points": [_point(one) for one in drafted],
        "rolling": {
            "tokens_per_s": _lines(rolling_tokens_per_s(drafted)),
            "alpha": _lines(rolling_alpha(drafted)),
            "tau": _lines(rolling_tau(drafted)),
        },
        "marks": _marks(service, drafted),
    }


def conversations_of(service: Service, before: int | None) -> dict[str, Any]:
    """A page of stored requests, newest first.

    Args:
        service: whose.
        before: only older ones than this id.
    """
    if service.store is None:
        return {"conversations": [], "more": False}
    store, tokenizer = service.store, service.tokenizer
    listed = store.requests.list(pair_of(service.config), before_id=before, newest=PAGE_REQUESTS + 1)
    shown = list(reversed(listed))[:PAGE_REQUESTS]
    records = store.requests.load([one.id for one in shown])
    return {
        "conversations": [
            {
                **_point(summary),
                "domain": summary.domain,
                "source": summary.source,
                "prompt": prompt_preview(record.prompt_tokens.tolist(), tokenizer),
                "answer": answer_preview(record.answer_tokens.tolist(), tokenizer),
            }
            for summary, record in zip(shown, records, strict=True)
        ],
        "more": len(listed) > PAGE_REQUESTS,
    }


def conversation_of(service: Service, identity: int) -> dict[str, Any]:
    """One request's turns, and its answer token by token.

    Raises:
        InputError: nothing is stored here.
        RecordLost: it was never stored, or made room for others.
    """
    if service.store is None:
        raise InputError("nothing is stored here", remedy="Set storage.collect to true and start again.")
    (record,) = service.store.requests.load([identity])
    return {
        "id": identity,
        "time_s": record.created_s,
        "adapter": record.adapter,
        "domain": record.domain,
        "finish_reason": record.finish_reason,
        "sampling": asdict(record.sampling),
        "turns": [asdict(turn) for turn in turns_of(record.prompt_tokens.tolist(), service.tokenizer)],
        "tokens": [asdict(token) for token in answer_tokens_of(record, service.tokenizer)],
    }


def adapters_of(service: Service) -> dict[str, Any]:
    """Every adapter of the pair, newest first, in the report's words."""
    if service.store is None:
        return {"active": None, "adapters": []}
    pair = pair_of(service.config)
    active = service.store.adapters.active(pair)
    name = None if active is None else active.name
    views = adapter_views(service.store.adapters.list(pair), name)
    return {"active": name, "adapters": [asdict(view) for view in views]}


def training_of(service: Service) -> dict[str, Any]:
    """What training waits for, and the newest runs, newest first."""
    if service.store is None:
        return {"waiting": "", "runs": []}
    store, pair = service.store, pair_of(service.config)
    selection = select(store, pair, service.config)
    drafted = drafted_of(store.requests.list(pair))
    runs = list(reversed(store.runs.list(pair)))[:NEWEST_RUNS]
    views = run_views(runs, store.adapters.list(pair), {run.id: store.runs.points(run.id) for run in runs})
    return {
        "waiting": training_state(selection, service.config.speculative.acceptance_threshold, len(drafted)),
        "runs": [
            {key: getattr(view, key) for key in ("title", "status", "word", "facts", "reason")}
            for view in views
        ],
    }


def _draft_name(service: Service) -> str | None:
    return service.config.models.draft.name if service.with_draft else None


def _stores(service: Service) -> bool:
    return service.store is not None and service.config.storage.collect


def _answered(service: Service) -> list[int]:
    """Changes with every answer that is stored, or kept."""
    newest = [] if service.store is None else service.store.requests.list(pair_of(service.config), newest=1)
    return [newest[0].id if newest else 0, 0 if service.session is None else service.session.count]


def _learnt(service: Service) -> list[Any]:
    """Changes with adapters, with which one is active, and with runs."""
    if service.store is None:
        return []
    pair, store = pair_of(service.config), service.store
    run = store.runs.latest(pair)
    return [
        store.adapters.generation(pair),
        len(store.adapters.list(pair)),
        *([] if run is None else [run.id, run.status]),
    ]


def _point(summary: RequestSummary) -> dict[str, Any]:
    return {
        "id": summary.id,
        "time_s": summary.created_s,
        "adapter": summary.adapter,
        "answer_tokens": summary.num_answer_tokens,
        "tokens_per_s": tokens_per_s_of(summary),
        "alpha": alpha_of(summary),
        "tau": tau_of(summary),
    }


def _lines(segments: Sequence[Sequence[RollingPoint]]) -> list[list[tuple[int, float]]]:
    return [[(point.position, point.value) for point in segment] for segment in segments if segment]


def _marks(service: Service, drafted: Sequence[RequestSummary]) -> list[dict[str, Any]]:
    """Promotions and reverts among these requests; what came before the first of them is left out."""
    if service.store is None:
        return []
    pair, store = pair_of(service.config), service.store
    history = store.adapters.history(pair)
    if not _stores(service):
        # Nothing was stored when they happened: the clock tells between which requests that was.
        history = [
            replace(
                event,
                request_id=max((one.id for one in drafted if one.created_s <= event.created_s), default=0),
            )
            for event in history
        ]
    marks = marks_of(drafted, store.adapters.list(pair), history)
    return [asdict(mark) for mark in marks if mark.x > 0.5]
