"""Health and readiness, and the application's life around the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from draftloop.config import load_config
from draftloop.server.app import create_app
from draftloop.server.service import open_service

if TYPE_CHECKING:
    from stepped import SteppedEngine


def test_the_application_is_ready_until_it_drains(engine: SteppedEngine) -> None:
    service = open_service(load_config().config, engine)
    engine.free()
    with TestClient(create_app(service), base_url="http://localhost") as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        service.worker.drain()
        assert client.get("/health").status_code == 200
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "shutting down"})
    assert service.worker.stop(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_application_whose_models_thread_broke_says_so(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    service = open_service(load_config().config, engine)
    monkeypatch.setattr(service.worker, "_look_around", broken)
    engine.free()
    with TestClient(create_app(service), base_url="http://localhost") as client:
        body = {"model": "draftloop", "messages": [{"role": "user", "content": "Hello"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 503
        service.worker._thread.join(30)
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "broken"})
        assert client.post("/v1/chat/completions", json=body).status_code == 503
