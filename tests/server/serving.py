"""A server on a free port, in a thread, with a toy pair behind it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from draftloop.config import Config
from draftloop.loading import load_engine
from draftloop.server.app import create_app
from draftloop.server.service import open_service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fastapi import FastAPI


class _Announced(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()

    async def startup(self, sockets: list[object] | None = None) -> None:
        await super().startup(sockets)  # type: ignore[arg-type]
        self.listens.set()


def toy_config(folders: tuple[Path, Path], **sections: object) -> Config:
    target, draft = folders
    models = {
        "target": {"name": str(target), "max_kv_cache_tokens": 1024},
        "draft": {"name": str(draft), "max_kv_cache_tokens": 1024},
    }
    values = {
        "models": models,
        "backend": "numpy",
        "storage": {"collect": False},
        "generation": {"max_tokens": 24},
        "speculative": {"schedule": "fixed"},
        **sections,
    }
    return Config.model_validate(values)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The server's address while it runs."""
    server = _Announced(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.listens.wait(30)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def toy_server(folders: tuple[Path, Path], **sections: object) -> Iterator[str]:
    """A whole server of the pair in `folders`."""
    config = toy_config(folders, **sections)
    with served(create_app(open_service(config, load_engine(config)))) as address:
        yield address
