"""`/metrics`: what Prometheus reads is what happened."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from draftloop.config import load_config
from draftloop.server.app import create_app
from draftloop.server.service import open_service

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepped import SteppedEngine

    from draftloop.server.tickets import Job


def samples(client: TestClient) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_what_is_told_is_what_happened(engine: SteppedEngine, job: Callable[..., Job]) -> None:
    engine.free()
    service = open_service(load_config().config, engine)
    with TestClient(create_app(service), base_url="http://localhost") as client:
        before = samples(client)
        assert before["draftloop_requests_total outcome=length"] == 0
        assert "draftloop_alpha" not in before

        async def ask() -> None:
            async for _ in service.worker.submit(job()):
                pass

        asyncio.run(ask())
        after = samples(client)
    counts = service.worker.snapshot().counts
    assert after["draftloop_requests_total outcome=length"] == 1
    assert after["draftloop_tokens_total kind=completion"] == 12
    assert after["draftloop_tokens_total kind=drafted"] == counts.total.drafted_tokens > 0
    assert after["draftloop_alpha"] == counts.recent.alpha
    assert after["draftloop_tau"] == 12 / counts.total.rounds
    rounds = {key: value for key, value in after.items() if key.startswith("draftloop_rounds_total")}
    assert sum(rounds.values()) == counts.total.rounds
    assert after["draftloop_time_to_first_token_seconds_count"] == 1
    first = counts.total.completion_tokens - after["draftloop_time_between_tokens_seconds_count"]
    assert 1 <= first <= 5
    assert after["draftloop_adapter name=none"] == 1
    assert after["draftloop_ready"] == 1


def test_what_the_guards_refuse_is_told_by_status(engine: SteppedEngine) -> None:
    settings = ["server.api_key=let-me-in", "server.max_body_megabytes=1"]
    app = create_app(open_service(load_config([], settings).config, engine))
    with TestClient(
        app, base_url="http://localhost", headers={"Authorization": "Bearer let-me-in"}
    ) as client:
        told = samples(client)
        assert {key: told[key] for key in told if "http_refused" in key} == {
            f"draftloop_http_refused_total status={status}": 0 for status in (401, 403, 408, 413)
        }
        for _ in range(2):
            client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
        client.get("/v1/models", headers={"Host": "elsewhere.example"})
        client.post("/v1/completions", content=b" " * 1_000_001)
        told = samples(client)
    assert [told[f"draftloop_http_refused_total status={status}"] for status in (401, 403, 408, 413)] == [
        2, 1, 0, 1,
    ]  # fmt: skip
    assert told["draftloop_requests_total outcome=refused"] == 0
