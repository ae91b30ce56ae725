"""`draftloop serve`: the pair as a local service that any OpenAI client can use.

Contract: refuses what is unsafe or cannot work before any model is loaded; then serves until told to stop.
Must not know how an answer is made.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from draftloop.cli import options
from draftloop.cli.asking import AnswerOptions, load_models, open_store_for, prepare_models
from draftloop.cli.console import say
from draftloop.errors import BackendUnavailable, InputError

if TYPE_CHECKING:
    import socket

    from draftloop.config import Config
    from draftloop.loading import Prepared
    from draftloop.server.learning import Learner
    from draftloop.storage.store import Store

API_KEY_VARIABLE = "DRAFTLOOP_API_KEY"
LAST_ROUND_S = 10.0
"""How long a round that is under way may take to end when the user will not wait."""

Host = Annotated[
    str | None,
    typer.Option("--host", metavar="NAME", help="Where to listen. [server.host]"),
]
Port = Annotated[
    int | None,
    typer.Option("--port", metavar="N", help="0 takes a free one. [server.port]"),
]
NoLearn = Annotated[
    bool, typer.Option("--no-learn", help="Do not train meanwhile. [adaptation.auto_train=false]")
]


def serve(
    context: typer.Context,
    *,
    host: Host = None,
    port: Port = None,
    no_learn: NoLearn = False,
    no_collect: options.NoCollect = False,
    no_speculation: options.NoSpeculation = False,
) -> None:
    """Serve the pair to OpenAI clients, and learn meanwhile."""
    _check_packages()
    forced = [*(["storage.collect=false"] if no_collect else [])]
    forced += ["adaptation.auto_train=false"] if no_learn else []
    config = _with_key(options.load_settings(context, forced=forced).config)
    _check_safe(config)
    asked = AnswerOptions(
        config=config,
        system=config.chat.system_message or "",
        with_draft=not no_speculation,
        source=context.info_name or "",
    )
    from draftloop.server.serving import bind

    with bind(config.server.host, config.server.port) as bound, open_store_for(asked) as store:
        finished = _serve(context, asked, store, bound)
    if not finished:
        raise KeyboardInterrupt


def _serve(context: typer.Context, asked: AnswerOptions, store: Store | None, bound: socket.socket) -> bool:
    """Load, serve, leave; whether what was being answered came to its end."""
    from draftloop.server.app import create_app
    from draftloop.server.service import open_service
    from draftloop.server.serving import serve as serve_app
    from draftloop.server.serving import url_of

    config = asked.config
    say("preparing the models")
    prepared = prepare_models(asked)
    learner = _learner(context, asked, store, prepared)
    engine = load_models(config, prepared, store, lines=True)
    service = open_service(config, engine, store, learner=learner, with_draft=asked.with_draft)
    url = url_of(config.server.host, bound)

    def tell() -> None:
        key = "<your key>" if config.server.api_key else "none"
        say(f"serving {service.model} at {url} (Ctrl-C stops)")
        say(f"OpenAI clients: OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}")

    try:
        return serve_app(create_app(service), service.worker, config.server, bound, tell)
    finally:
        # The store is closed next: nobody may write to it any more.
        service.worker.stop(LAST_ROUND_S)


def _learner(
    context: typer.Context, asked: AnswerOptions, store: Store | None, prepared: Prepared
) -> Learner | None:
    """What learns meanwhile; where nothing does, the user is told why."""
    if store is None:
        return None
    from draftloop.server.learning import open_learner

    arguments = options.global_arguments(context)
    learner = open_learner(asked.config, store, prepared.plan, arguments, with_draft=asked.with_draft)
    if learner.why_off is not None:
        say(f"nothing is learnt meanwhile: {learner.why_off}")
    return learner


def _check_packages() -> None:
    """The server's packages are an extra.

    Raises:
        BackendUnavailable: one is missing.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"the server needs {error.name}, which is not installed",
            remedy="Install it with: pip install 'draftloop[server]'",
        ) from None


def _with_key(config: Config) -> Config:
    """The settings with the environment's API key, where they have none of their own."""
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if config.server.api_key is not None or not key:
        return config
    return config.model_copy(update={"server": config.server.model_copy(update={"api_key": key})})


def _check_safe(config: Config) -> None:
    """Whoever reaches this machine could use the models.

    Raises:
        InputError: it would be reached from elsewhere and has no API key.
    """
    from draftloop.server.guards import is_loopback

    if config.server.api_key is None and not is_loopback(config.server.host):
        raise InputError(
            f"server.host = {config.server.host} is reached from other machines, and there is no API key",
            remedy=f"Set {API_KEY_VARIABLE} or server.api_key, or listen at 127.0.0.1.",
        )
