"""What a chat says of learning in the background: one line for each event, never inside an answer.

Contract: a line is shown before the next prompt, or above the prompt of a user who has typed nothing yet. A
thread looks now and then; everything it does may happen while an answer is made. Must not know how training
is started.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from draftloop.cli import options
from draftloop.cli.console import say, write
from draftloop.cli.figures import shown
from draftloop.errors import DraftloopError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import typer

    from draftloop.cli.asking import AnswerOptions
    from draftloop.learning.background import Ended, IdleLearner, Started
    from draftloop.storage.store import Store

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between two looks at whether it is time to learn."""
PROMPT = "> "


def open_news(context: typer.Context, asked: AnswerOptions, store: Store | None) -> ChatNews:
    """Learning for one chat, where the settings, the store and the backend allow it."""
    from draftloop.learning.background import IdleLearner, why_not
    from draftloop.loading import pair_of

    config = asked.config
    if store is None or why_not(config, with_draft=asked.with_draft) is not None:
        return ChatNews()

    arguments = options.global_arguments(context)
    if "--num-draft-tokens" in options.flags_given(context):
        # The gate shall judge by the rounds of this chat.
        arguments += ["--set", f"speculative.num_draft_tokens={config.speculative.num_draft_tokens}"]
    directory = Path(config.storage.directory)
    return ChatNews(IdleLearner(store, directory, pair_of(config), config, arguments))


class ChatNews:
    """Events of learning, brought to the user at the right moments: `with ChatNews(learner) as news: …`.

    Args:
        learner: decides when to learn; without one nothing ever happens.
    """

    def __init__(self, learner: IdleLearner | None = None) -> None:
        self._learner = learner
        self._pending: list[str] = []
        self._at_prompt = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._learner is not None:
            self._thread = threading.Thread(target=self._look_again, name="learning", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop a run that is under way, with a checkpoint, and say so."""
        self._over.set()
        if self._learner is None or self._thread is None:
            return
        self._thread.join()
        self.show()
        if self._learner.leave():
            say(
                "the training stops after its current step, with a checkpoint; the next chat, or "
                "draftloop train --resume, goes on with it"
            )

    def show(self) -> None:
        """Say what has happened since the last time; the cursor is at the beginning of a line."""
        with self._lock:
            self._say_pending()

    @contextlib.contextmanager
    def at_prompt(self) -> Iterator[None]:
        """The user is asked for a line inside the block."""
        with self._lock:
            self._say_pending()
            self._at_prompt = True
        try:
            yield
        finally:
            with self._lock:
                self._at_prompt = False

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """An answer is made inside the block: no time to begin learning."""
        if self._learner is None:
            yield
            return
        self._learner.began()
        try:
            yield
        finally:
            self._learner.ended()

    def tell(self, text: str) -> None:
        """Have one line said at the next right moment, which may be now."""
        with self._lock:
            if self._at_prompt and _nothing_typed():
                # The prompt's line becomes this one, and the prompt stands below it again.
                write(f"\r{text}\n{PROMPT}")
            else:
                self._pending.append(text)

    def _say_pending(self) -> None:
        for text in self._pending:
            say(text)
        self._pending.clear()

    def _look_again(self) -> None:
        while self._learner is not None and not self._over.wait(LOOK_S):
            try:
                event = self._learner.look()
            except Exception as error:
                # The chat goes on, and nobody would notice that the thread has ended.
                logger.debug("a look at whether it is time to learn failed", exc_info=error)
                foreseen = isinstance(error, DraftloopError)
                words = str(error) if foreseen else f"unexpected {type(error).__name__}"
                self.tell(f"no more news of learning in this chat: {words}")
                return
            if event is not None:
                self.tell(news_of(event))


def news_of(event: Started | Ended) -> str:
    """One line."""
    from draftloop.learning.background import Ended

    if isinstance(event, Ended):
        return verdict_line(event.outcome)
    if event.resumed:
        return "going on with the interrupted training in the background"
    return f"learning from {event.failures} failures in the background"


def verdict_line(outcome: dict[str, Any]) -> str:
    """One line for how a run ended; `outcome` is what `train --json` prints."""
    if outcome.get("status") != "promoted":
        return f"training {outcome.get('status')}: {outcome.get('reason')}"
    tau = " → ".join(shown(outcome.get(f"tau_{when}"), 2) for when in ("before", "after"))
    low, high = outcome["gain_ci95"]
    return (
        f"adapter {outcome['adapter']} promoted: tau {tau} on held-out requests, "
        f"{100 * outcome['gain']:+.1f} % tokens/s (95 %: {100 * low:.1f} to {100 * high:.1f})"
    )


def _nothing_typed() -> bool:
    """Whether the prompt is all that stands in the terminal's last line, as far as can be known."""
    readline = sys.modules.get("readline")
    if readline is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return not readline.get_line_buffer()
