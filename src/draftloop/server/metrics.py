"""`/metrics` for Prometheus.

Contract: a registry of one's own; every value is read from the worker's and the learner's state when it is
asked for. Metrics are computed by `speculation.metrics`. Must not know how anything is counted.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.responses import Response

from draftloop.errors import StorageError
from draftloop.server.guards import REFUSALS
from draftloop.server.learning import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from draftloop.server.figures import Snapshot
    from draftloop.server.learning import LearningState
    from draftloop.server.service import Service

NAMESPACE = "draftloop_"


class ServiceCollector:
    """Everything that is told of a service but the times to tokens, which are histograms of their own."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """As prometheus-client wants it."""
        snapshot = self._service.worker.snapshot()
        yield from _requests(snapshot)
        yield from _tokens(snapshot)
        yield from _speed(snapshot)
        yield from _memory(snapshot)
        if self._service.learner is not None:
            # A store that cannot be read hides what it would tell, and nothing else.
            with suppress(StorageError):
                yield from _learning(self._service.learner.state())


def metrics_router(service: Service) -> APIRouter:
    """The one address, over a registry made for this service."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(service))
    registry.register(service.worker.figures.first_token_s)
    registry.register(service.worker.figures.between_tokens_s)
    router = APIRouter()

    @router.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    def metrics() -> Response:
        """The text format."""
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _requests(snapshot: Snapshot) -> Iterator[Metric]:
    requests = CounterMetricFamily(f"{NAMESPACE}requests", "Requests by how they ended.", labels=["outcome"])
    for outcome, count in snapshot.counts.requests.items():
        requests.add_metric([outcome.value], count)
    yield requests
    refused = CounterMetricFamily(
        f"{NAMESPACE}http_refused",
        "Requests that the guards refused: no key, another host or origin, a body too large or slow.",
        labels=["status"],
    )
    for status in REFUSALS:
        refused.add_metric([str(status)], snapshot.counts.refused.get(status, 0))
    yield refused
    yield _gauge("requests_active", "Requests being answered.", snapshot.active)
    yield _gauge("requests_queued", "Requests that wait.", snapshot.queued)
    yield _gauge("ready", "Whether requests are taken.", snapshot.ready)


def _tokens(snapshot: Snapshot) -> Iterator[Metric]:
    counts, total = snapshot.counts, snapshot.counts.total
    tokens = CounterMetricFamily(f"{NAMESPACE}tokens", "Tokens by kind.", labels=["kind"])
    for kind, count in (
        ("prompt", counts.prompt_tokens),
        ("prompt_cached", counts.cached_tokens),
        ("completion", total.completion_tokens),
        ("drafted", total.drafted_tokens),
        ("accepted", total.accepted_tokens),
        ("suffix_drafted", total.suffix_drafted_tokens),
        ("suffix_accepted", total.suffix_accepted_tokens),
    ):
        tokens.add_metric([kind], count)
    yield tokens
    rounds = CounterMetricFamily(
        f"{NAMESPACE}rounds",
        "Rounds by how many tokens the draft model proposed (K).",
        labels=["drafted_tokens"],
    )
    for drafted_tokens, count in counts.all_drafted_per_round.items():
        rounds.add_metric([str(drafted_tokens)], count)
    yield rounds


def _speed(snapshot: Snapshot) -> Iterator[Metric]:
    counts = snapshot.counts
    yield _gauge("tokens_per_second", "Of recent rounds.", counts.tokens_per_s)
    yield _gauge("alpha", "Expected acceptance of one position, of recent rounds.", counts.recent.alpha)
    yield _gauge("tau", "Tokens per round, of recent rounds.", counts.recent.tau)
    yield _gauge("acceptance_rate", "Accepted / drafted, of recent rounds.", counts.recent.acceptance_rate)


def _memory(snapshot: Snapshot) -> Iterator[Metric]:
    yield _gauge("kv_bytes", "What answers being made hold in both models' caches.", snapshot.kv_bytes)
    yield _gauge("prefix_cache_bytes", "What is kept of past texts.", snapshot.prefix_cache_bytes)
    adapter = GaugeMetricFamily(f"{NAMESPACE}adapter", "What the draft wears.", labels=["name"])
    adapter.add_metric([snapshot.adapter or "none"], 1)
    yield adapter


def _learning(state: LearningState) -> Iterator[Metric]:
    progress = state.progress
    phase = GaugeMetricFamily(f"{NAMESPACE}learning_phase", "What learning does.", labels=["phase"])
    for one in Phase:
        phase.add_metric([one.value], one is state.phase)
    yield phase
    figures: tuple[float | None, ...] = (None,) * 4
    if progress is not None:
        figures = progress.step, progress.steps, progress.eta_s, progress.validation_alpha
    step, steps, eta_s, alpha = figures
    yield _gauge("training_step", "Steps done of the run under way.", step)
    yield _gauge("training_steps", "Steps planned of it.", steps)
    yield _gauge("training_eta_seconds", "Until its last step.", eta_s)
    yield _gauge("validation_alpha", "Its newest, on held-out requests.", alpha)
    changes = CounterMetricFamily(
        f"{NAMESPACE}adapter_changes", "Changes of the active adapter.", labels=["kind"]
    )
    changes.add_metric(["promotion"], state.promotions)
    changes.add_metric(["revert"], state.reverts)
    yield changes


def _gauge(name: str, help_text: str, value: float | None) -> GaugeMetricFamily:
    """A gauge; without a sample where there is no value yet."""
    gauge = GaugeMetricFamily(f"{NAMESPACE}{name}", help_text)
    if value is not None:
        gauge.add_metric([], value)
    return gauge
