"""`draftloop chat`: a conversation of many turns, in a terminal or from piped lines.

Contract: the history and the KV cache are kept from turn to turn; a turn that fails or is stopped leaves
both whole. Another adapter may become active between two turns. Must not know how an answer is made.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import uuid
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING

import typer

from draftloop.cli import options
from draftloop.cli.answer import AnswerWriter, watch
from draftloop.cli.asking import (
    AnswerOptions,
    framed,
    load_models,
    open_store_for,
    prepare_models,
    read_options,
)
from draftloop.cli.chat_learning import PROMPT, ChatNews, open_news
from draftloop.cli.console import say, say_error, say_failure, write
from draftloop.cli.figures import completion_line, speed_line, total
from draftloop.cli.interrupts import interrupt_as_flag
from draftloop.cli.prompts import read_turns
from draftloop.errors import ContextFull, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.engine import Completion, Engine
    from draftloop.learning.recorder import Provenance
    from draftloop.models.messages import Message
    from draftloop.types import TokenKind

HELP = """\
/stats          figures of the last answer and of the whole chat
/clear          forget the conversation
/system TEXT    set the system message and forget the conversation; without TEXT, show it
/help           this list
/quit           leave (so does Ctrl-D)
//TEXT          send /TEXT to the models: a message that begins with a slash
Ctrl-C stops an answer."""


@options.takes_answer_flags()
def chat(
    context: typer.Context,
    *,
    flags: options.AnswerFlags,
    color: options.Color = False,
) -> None:
    """Talk with the pair, which learns meanwhile."""
    asked = read_options(context, flags)
    exit_status = 0
    with open_store_for(asked) as store:
        engine = load_models(asked.config, prepare_models(asked), store, adapter=asked.adapter)
        with open_news(context, asked, store) as news:
            loop = ChatLoop(engine, asked, AnswerWriter(color=color), news)
            if sys.stdin.isatty():
                loop.run_interactively()
            else:
                exit_status = loop.run_lines()
    if exit_status:
        raise typer.Exit(exit_status)


class ChatLoop:
    """One conversation: its messages, its caches, and what each answer cost."""

    def __init__(
        self, engine: Engine, asked: AnswerOptions, writer: AnswerWriter, news: ChatNews | None = None
    ) -> None:
        self._engine = engine
        self._asked = asked
        self._writer = writer
        self._news = news or ChatNews()
        self._system = asked.system
        self._turns: list[Message] = []
        self._conversation = engine.open_conversation()
        self._identity = uuid.uuid4().hex
        self._completions: list[Completion] = []
        self._interactive = False

    def run_interactively(self) -> None:
        """Read turns from a terminal until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() edits lines and remembers them once it is loaded
        say("Write a message. /help lists the commands, Ctrl-D leaves.")
        self._writer.legend()
        self._interactive = True
        # The second of two Ctrl-C may come at any moment, for example while the hint is written.
        with contextlib.suppress(KeyboardInterrupt):
            self._read_terminal()

    def _read_terminal(self) -> None:
        interrupted = False
        while True:
            try:
                with self._news.at_prompt():
                    line = _ask()
                interrupted = False
                if line.strip() == "/quit":
                    return
                self._take_safely(line)
            except KeyboardInterrupt:
                say("")
                if interrupted:
                    return
                interrupted = True
                say("Ctrl-C again or Ctrl-D leaves.")
            except EOFError:
                say("")
                return
            except UnicodeDecodeError:
                say_error("the message is not UTF-8. Write it again.")

    def run_lines(self) -> int:
        """Take each line of a piped stdin as a turn; returns the highest exit status of a failed one."""
        exit_status = 0
        for line in read_turns():
            self._news.show()
            if line.strip() == "/quit":
                break
            exit_status = max(exit_status, self._take_safely(line))
        return exit_status

    def _take_safely(self, line: str) -> int:
        try:
            self._take(line.strip())
        except ContextFull as error:
            remedy = "Forget the conversation with /clear, or raise models.target.max_kv_cache_tokens."
            say_error(f"{error.what}. {remedy}")
            return error.exit_status
        except InputError as error:
            return say_failure(error)
        except BrokenPipeError:
            raise
        except Exception as error:
            exit_status = say_failure(error)
        else:
            return 0
        # Here, and not above, where the error's traceback still holds the old caches' memory.
        self._renew_caches()
        return exit_status

    def _renew_caches(self) -> None:
        """Begin with empty caches: work broke off in the middle of a round, and what they hold is unknown.

        The messages stay; the next turn reads them again.
        """
        del self._conversation
        self._conversation = self._engine.open_conversation()

    def _take(self, text: str) -> None:
        """One line: a command, a message, or nothing."""
        if not text:
            return
        command, _, rest = text.partition(" ")
        if text.startswith("//"):
            self._answer(options.check_text(text[1:], "the message"))
        elif command == "/help":
            say(HELP)
        elif command == "/clear":
            self._clear()
            say("The conversation is forgotten.")
        elif command == "/stats":
            self._say_stats()
        elif command == "/system":
            self._set_system(rest.strip())
        elif command.startswith("/"):
            raise InputError(f"there is no command {command}", remedy="/help lists them.")
        else:
            self._answer(options.check_text(text, "the message"))

    def _answer(self, text: str) -> None:
        from draftloop.models.messages import Message

        turns = [*self._turns, Message("user", text)]
        tokens = self._engine.tokenizer.chat_tokens(framed(self._system, turns))
        said: list[str] = []
        self._follow_adapter()

        def show(piece: str, kind: TokenKind) -> None:
            if not (said or self._interactive) and self._completions:
                # An empty line between two, as `generate --prompts` has it.
                write("\n")
            said.append(piece)
            self._writer.text(piece, kind)

        try:
            with _notes_afterwards(self._writer), self._news.answering(), interrupt_as_flag() as stop_wanted:
                request = self._asked.request(tokens, self._provenance())
                events = self._engine.stream(request, self._conversation)
                completion = watch(events, show, stop_wanted.is_set)
        except KeyboardInterrupt:
            self._renew_caches()
            raise
        if completion is None and not self._interactive:
            raise KeyboardInterrupt
        if completion is None and not said:
            say("(stopped before a word; your message is forgotten)")
            return
        self._turns = [*turns, Message("assistant", "".join(said))]
        if completion is None:
            say("(stopped)")
        else:
            self._completions.append(completion)
            self._say_if_cut(completion)

    def _follow_adapter(self) -> None:
        """Another process, or learning in the background, may have made another adapter active."""
        before = self._engine.adapter
        try:
            self._engine.follow_adapter()
        except InputError as error:
            # The draft goes on with what it wears.
            say_failure(error)
        if self._engine.adapter != before:
            say(f"the draft wears {self._engine.adapter or 'no adapter'} now")

    def _provenance(self) -> Provenance | None:
        if not self._asked.config.storage.collect:
            return None
        from draftloop.learning.recorder import Provenance, domain_of

        return Provenance(domain_of(self._system), self._asked.source, conversation=self._identity)

    def _say_if_cut(self, completion: Completion) -> None:
        from draftloop.types import FinishReason

        if completion.finish_reason is not FinishReason.LENGTH:
            return
        used, cap = len(self._conversation.tokens), self._conversation.max_tokens
        if used >= cap:
            say(f"(cut: the KV cache is full with {used} tokens; /clear forgets the conversation)")
        else:
            say(f"(cut at generation.max_tokens = {self._asked.config.generation.max_tokens})")

    def _set_system(self, text: str) -> None:
        if not text:
            say(f"system message: {self._system or '(none)'}")
            return
        self._system = options.check_text(text, "the system message")
        self._clear()
        say("The system message is set and the conversation is forgotten.")

    def _clear(self) -> None:
        self._turns = []
        self._conversation = self._engine.open_conversation()
        self._identity = uuid.uuid4().hex

    def _say_stats(self) -> None:
        if not self._completions:
            say("There is no finished answer yet.")
            return
        threshold = self._asked.config.speculative.acceptance_threshold
        tally, speed = total(self._completions)
        count = len(self._completions)
        answers = f"{count} answer{'s' if count > 1 else ''} · {tally.completion_tokens} tokens"
        cache = self._conversation.target_cache
        say(f"last answer  {completion_line(self._completions[-1], threshold)}")
        say(f"whole chat   {answers} · {speed_line(tally, speed, threshold)}")
        say(f"adapter      {self._engine.adapter or 'none'}")
        say(f"KV cache     {cache.position} of {cache.max_tokens} tokens")


def _ask() -> str:
    """The next line from the terminal; the prompt sign stays out of a piped stdout."""
    if sys.stdout.isatty():
        return input(PROMPT)
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


@contextlib.contextmanager
def _notes_afterwards(writer: AnswerWriter) -> Iterator[None]:
    """What the program's log has to say while an answer is shown comes below it.

    At `DEBUG`, which is there to show what happens when, it comes at once.
    """
    logger = logging.getLogger("draftloop")
    shown = logger.handlers[:]
    held = [MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize, target=handler) for handler in shown]
    if not logger.isEnabledFor(logging.DEBUG):
        logger.handlers[:] = held
    try:
        yield
    finally:
        logger.handlers[:] = shown
        writer.end()
        for handler in held:
            handler.close()
