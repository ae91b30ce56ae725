"""Everything that a route may need, and how it gets it.

Contract: made once (`app.create_app`), kept in the application's state, frozen. Must not know any route.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fastapi import Request  # noqa: TC002  # FastAPI reads annotations when it runs

from draftloop.models.grammar import Grammars
from draftloop.models.tool_calls import call_format_of
from draftloop.server.dashboard.session import SessionHistory
from draftloop.server.worker import Worker

if TYPE_CHECKING:
    from draftloop.config import Config
    from draftloop.engine import Engine
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.models.tool_calls import CallFormat
    from draftloop.server.learning import Learner
    from draftloop.storage.store import Store


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes serve.

    Attributes:
        config: the settings; `storage.collect` is false where nothing is stored.
        tokenizer: of the pair. It is read by any thread.
        worker: owns the models.
        vocab_size: the target's: token ids end before it.
        grammars: what answers can be held to.
        call_format: how the model writes calls of tools; None where it knows none.
        store: where answers are kept; None where there is none.
        with_draft: False where the target answers alone.
        learner: learns meanwhile; None where nothing is stored.
        session: figures of the answers since the beginning, where they are not stored.
    """

    config: Config
    tokenizer: Tokenizer
    worker: Worker
    vocab_size: int
    grammars: Grammars
    call_format: CallFormat | None = None
    store: Store | None = None
    with_draft: bool = True
    learner: Learner | None = None
    session: SessionHistory | None = None

    @property
    def model(self) -> str:
        """The name that clients ask for: the target's."""
        return self.config.models.target.name

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt and answer together."""
        return self.config.models.target.max_kv_cache_tokens


def open_service(
    config: Config,
    engine: Engine,
    store: Store | None = None,
    *,
    learner: Learner | None = None,
    with_draft: bool = True,
) -> Service:
    """Put a loaded engine behind a worker, as the settings have it. From now on it is the worker's."""
    worker = Worker(
        engine,
        max_queued_requests=config.server.max_queued_requests,
        request_timeout_s=config.server.request_timeout_s,
        learner=learner,
        log_prompts=config.server.log_prompts,
    )
    session = None
    if not config.storage.collect:
        session = SessionHistory()
        worker.figures.tell(session.add)
    vocab_size = engine.pair.target.architecture.vocab_size
    return Service(
        config=config,
        tokenizer=engine.tokenizer,
        worker=worker,
        vocab_size=vocab_size,
        grammars=Grammars(engine.tokenizer, vocab_size),
        call_format=call_format_of(engine.tokenizer),
        store=store,
        with_draft=with_draft,
        learner=learner,
        session=session,
    )


def get_service(request: Request) -> Service:
    """The service behind a request: a FastAPI dependency."""
    return cast("Service", request.app.state.service)
