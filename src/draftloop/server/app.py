"""The application: the service's routes, and its life from the first request to the last.

Contract: `create_app` makes one that serves `Service` and nothing else; no state outside it. Must not know
how an answer is made, nor sockets.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

from anyio import to_thread
from fastapi import FastAPI

from draftloop.engine import Engine
from draftloop.errors import DraftloopError
from draftloop.server import health
from draftloop.server.dashboard import routes as dashboard
from draftloop.server.guards import add_guards
from draftloop.server.metrics import metrics_router
from draftloop.server.openai import routes as openai

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from draftloop.server.service import Service

THREADS = 4
"""For what would hold up the event loop: a prompt's tokens, a look into the store. Each keeps what memory its
longest prompt took.
"""


def create_app(service: Service) -> FastAPI:
    """The ASGI application. Its life starts and stops the worker."""
    app = FastAPI(
        title="Draftloop",
        version=version("draftloop"),
        lifespan=_life,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(health.router)
    app.include_router(dashboard.router)
    app.include_router(metrics_router(service))
    openai.install(app)
    add_guards(app, service.config.server, service.worker.figures.refused)
    return app


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    to_thread.current_default_thread_limiter().total_tokens = THREADS
    service.worker.start()
    loop = asyncio.get_running_loop()

    async def follow() -> None:
        # Where it cannot be worn, the next request tells.
        with suppress(DraftloopError):
            await service.worker.call(Engine.follow_adapter)

    if service.learner is not None:
        service.learner.start(lambda: asyncio.run_coroutine_threadsafe(follow(), loop))
    try:
        yield
    finally:
        if service.learner is not None:
            await asyncio.to_thread(service.learner.stop)
        # Who streams has been waited for; what is left has had its time.
        await asyncio.to_thread(service.worker.stop, service.config.server.shutdown_timeout_s)
