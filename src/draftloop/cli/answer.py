"""Shows an answer as it comes: text to stdout, the prompt's progress to stderr.

Contract: what reaches stdout is the answer, and colour codes only where `color` is wanted and a terminal
shows it. Must not know where prompts come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from draftloop.cli.console import err_console, out_console, say, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.status import Status

    from draftloop.engine import Completion, Event, PromptProgress
    from draftloop.types import TokenKind

ACCEPTED_STYLE, SUFFIX_STYLE = "green", "cyan"
SLOW_PROMPT_TOKENS = 256
"""A longer rest of a prompt takes long enough to show how far it is."""


class AnswerWriter:
    """Writes the text of answers, with accepted draft tokens in another colour where that can be seen."""

    def __init__(self, *, color: bool = False, quiet: bool = False) -> None:
        """Start writing.

        Args:
            color: accepted draft tokens are wanted in another colour.
            quiet: nobody asked for it, so nothing is said where it cannot be seen.
        """
        console = out_console()
        self.colored = color and console.is_terminal and not console.no_color
        if color and not self.colored and not quiet:
            say("note: --color acts on a terminal that shows colours")
        self._last = ""
        self._explained = False

    def text(self, text: str, kind: TokenKind) -> None:
        """Write one piece."""
        self._last = text[-1:] or self._last
        write(painted(text, kind) if self.colored else text)

    def end(self) -> None:
        """End the line, unless the answer did."""
        if self._last not in ("", "\n"):
            write("\n")
        self._last = ""

    def legend(self) -> None:
        """Say what the colours mean, on stderr, before the first answer."""
        if self.colored and not self._explained:
            self._explained = True
            from rich.text import Text

            accepted = Text("accepted draft tokens", style=ACCEPTED_STYLE)
            found = Text("what a suffix match found", style=SUFFIX_STYLE)
            err_console().print(
                Text.assemble("colours: ", accepted, ", ", found, ", the target's own tokens")
            )


def painted(text: str, kind: TokenKind) -> str:
    """`text` with the colour codes of its kind around each line."""
    from rich.color import ColorSystem
    from rich.style import Style

    from draftloop.types import TokenKind

    names = {TokenKind.ACCEPTED: ACCEPTED_STYLE, TokenKind.SUFFIX: SUFFIX_STYLE}
    if kind not in names:
        return text
    style = Style.parse(names[kind])
    return "\n".join(style.render(line, color_system=ColorSystem.STANDARD) for line in text.split("\n"))


def watch(
    events: Iterator[Event],
    on_text: Callable[[str, TokenKind], None] | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Completion | None:
    """Follow one answer to its end.

    Args:
        events: of `Engine.stream`.
        on_text: is given each piece of text.
        stop_wanted: is asked between events; where it says so the answer ends there.

    Returns:
        The answer's end; None where it was stopped.
    """
    from draftloop.engine import Completion, PromptProgress, TextPiece

    reading = _Reading()
    try:
        for event in events:
            if isinstance(event, PromptProgress):
                reading.show(event)
            elif isinstance(event, TextPiece):
                reading.hide()
                if on_text is not None:
                    on_text(event.text, event.kind)
            elif isinstance(event, Completion):
                return event
            if stop_wanted():
                return None
    finally:
        reading.hide()
        close = getattr(events, "close", None)
        if close is not None:
            close()
    return None


class _Reading:
    """How much of the prompt is read ("512 of 3000 tokens"), on a terminal and for long prompts only."""

    def __init__(self) -> None:
        self._console = err_console()
        self._status: Status | None = None
        self._first_tokens: int | None = None

    def show(self, progress: PromptProgress) -> None:
        if self._first_tokens is None:
            self._first_tokens = progress.done_tokens
        long = progress.total_tokens - self._first_tokens > SLOW_PROMPT_TOKENS
        if not (long and self._console.is_terminal):
            return
        message = f"reading the prompt: {progress.done_tokens} of {progress.total_tokens} tokens"
        if self._status is None:
            self._status = self._console.status(message)
            self._status.start()
        self._status.update(message)

    def hide(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
