"""`draftloop chat`: turns from a pipe, and Ctrl-C in a real terminal."""

from __future__ import annotations

import itertools
import os
import re
import select
import signal
import sys
import time

import pytest
from cli_runner import settings

from draftloop.cli.answer import AnswerWriter, watch
from draftloop.cli.asking import AnswerOptions
from draftloop.cli.chat import ChatLoop
from draftloop.config import load_config
from draftloop.engine import Engine, RoundDone
from draftloop.errors import OutOfMemory
from draftloop.loading import load_engine
from draftloop.speculation.round import Round
from draftloop.types import TokenKind

pty = pytest.importorskip("pty", reason="needs a Unix terminal")

OWN_CACHE = {"memory.prefix_cache_megabytes": 0}
"""What is cached is the conversation's own."""

PATIENCE_S = 60
AGAIN_S = 5


@pytest.fixture
def chat(draftloop, toys_on_numpy):
    """`chat(*lines, flags=…, options=…)` with the toy pair, greedily."""

    def call(*lines, flags=(), options=()):
        stdin = b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines)
        return draftloop(
            *toys_on_numpy, *settings(**OWN_CACHE), *options, "chat", "--temperature", 0, *flags, stdin=stdin
        )

    return call


def _prompt_tokens(result) -> list[int]:
    return [int(count) for count in re.findall(r"last answer  (\d+) prompt tokens", result.err)]


def test_one_turn_answers_like_generate(chat, draftloop, toys_on_numpy):
    text = draftloop(*toys_on_numpy, "generate", "hello", "--temperature", 0, "--no-stats").out
    assert chat("hello").out == text
    assert chat(b"hello").out == text


def test_blank_lines_are_no_turns_and_quit_ends(chat):
    assert chat("", "   ", "/quit", "hello").out == ""
    assert chat("hello", "/quit", "again").out == chat("hello").out


def test_the_history_is_kept_and_the_cache_reused(chat):
    result = chat("hello", "/stats", "again", "/stats")
    first, second = _prompt_tokens(result)
    assert second > first
    cached = int(re.search(r"\((\d+) cached\)", result.err).group(1))
    assert cached >= first
    assert "1 answer ·" in result.err
    assert "2 answers ·" in result.err
    assert len(re.findall(r"KV cache     \d+ of 4096 tokens", result.err)) == 2
    for word in ("tok/s", "tau", "alpha", "acceptance_rate"):
        assert result.err.count(word) >= 4


@pytest.mark.parametrize("megabytes", [0, 1])
def test_clear_forgets_the_conversation_but_not_what_was_read(chat, megabytes):
    options = settings(**{"memory.prefix_cache_megabytes": megabytes})
    result = chat("hello", "/stats", "/clear", "hello", "/stats", options=options)
    first, second = _prompt_tokens(result)
    assert first == second
    cached = [int(count) for count in re.findall(r"\((\d+) cached\)", result.err)]
    assert cached == ([first - 1] if megabytes else [])
    answer = chat("hello").out
    assert result.out == f"{answer}\n{answer}"


def test_system_sets_and_shows_and_forgets(chat):
    result = chat("hello", "/system", "/system be brief", "/system", "hello", "/stats")
    assert "system message: You are Qwen" in result.err
    assert "system message: be brief" in result.err
    by_flag = chat("hello", "/stats", flags=["--system", "be brief"])
    assert _prompt_tokens(result) == _prompt_tokens(by_flag)
    assert result.out.endswith(by_flag.out)
    assert "system message: (none)" in chat("/system", flags=["--system", ""]).err


def test_stats_before_the_first_answer_and_help(chat):
    result = chat("/stats", "/help")
    assert "no finished answer" in result.err
    for command in ("/stats", "/clear", "/system", "/quit", "/help"):
        assert command in result.err


def test_an_unknown_command_is_told_and_the_chat_goes_on(chat):
    result = chat("/nonsense", "hello")
    assert "error: there is no command /nonsense" in result.err
    assert result.out == chat("hello").out
    assert result.exit_status == 2


def test_a_turn_that_does_not_fit_is_not_kept(chat):
    small = settings(**{"models.target.max_kv_cache_tokens": 200})
    result = chat("x" * 300, "hello", "/stats", options=small)
    assert "max_kv_cache_tokens is 200" in result.err
    assert "/clear" in result.err
    assert _prompt_tokens(result) == _prompt_tokens(chat("hello", "/stats"))
    assert result.out == chat("hello").out
    assert result.exit_status == 2


def test_an_answer_that_was_cut_says_by_what(chat):
    assert "generation.max_tokens = 12" in chat("hello").err
    full = settings(
        **{"models.target.max_kv_cache_tokens": 100, "generation.max_tokens": 90, "generation.min_tokens": 90}
    )
    assert "the KV cache is full with 100 tokens" in chat("hello", options=full).err


def test_wrong_flags_and_wrong_bytes(chat):
    chat("hello", flags=["--max-tokens", 0]).assert_wrong_input("--max-tokens")
    result = chat("hello", b"caf\xe9\n")
    assert result.exit_status == 2
    assert "stdin:2 is not UTF-8: byte 0xe9 at offset 3" in result.err
    assert result.out == chat("hello").out


def test_two_slashes_send_one(chat, draftloop, toys_on_numpy):
    text = draftloop(*toys_on_numpy, "generate", "/hello there", "--temperature", 0, "--no-stats").out
    assert chat("//hello there").out == text
    assert "//TEXT" in chat("/help").err


def _stream_that(monkeypatch, disturb):
    """Call `disturb(number)` in the midst of each answer, counted from 1."""
    original, answers = Engine.stream, itertools.count(1)

    def stream(engine, request, conversation=None):
        number = next(answers)
        for event in original(engine, request, conversation):
            if isinstance(event, RoundDone):
                disturb(number)
            yield event

    monkeypatch.setattr(Engine, "stream", stream)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("broken\nwithin"), "error: unexpected RuntimeError: broken within. "),
        (OutOfMemory("memory ran out", remedy="Ask for less."), "error: memory ran out. Ask for less."),
    ],
)
def test_an_answer_that_fails_is_one_line_and_the_history_stays(chat, monkeypatch, error, line):
    def fail(number):
        if number == 2:
            raise error

    first, both = chat("hello").out, chat("hello", "again").out
    _stream_that(monkeypatch, fail)
    result = chat("hello", "again", "again", "/stats")
    assert [text for text in result.err.splitlines() if text.startswith("error")] == [
        text for text in result.err.splitlines() if text.startswith(line)
    ]
    assert result.err.count("error: ") == 1
    assert result.out.startswith(first)
    assert result.out.endswith(both.removeprefix(first))
    assert "last answer" in result.err
    assert "cached" not in result.err  # nobody knows what the caches held, so all was read again
    assert result.exit_status == 1


def test_a_reader_that_goes_away_ends_the_chat(loop, monkeypatch):
    def fail(number):
        raise BrokenPipeError

    _stream_that(monkeypatch, fail)
    with pytest.raises(BrokenPipeError):
        loop("hello", "again")


def test_an_interrupt_ends_a_piped_chat(chat, monkeypatch):
    _stream_that(monkeypatch, lambda number: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    result = chat("hello", "again")
    assert result.exit_status == 130
    assert "error" not in result.err
    assert len(result.out) < len(chat("hello").out) + 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait_for_the_round(loop, monkeypatch, capsys):
    def interrupt(number):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            waited.append(number)

    waited = []
    loop("hello", "again")
    undisturbed = capsys.readouterr().out
    _stream_that(monkeypatch, interrupt)
    loop("hello", "again", "again", "/stats")
    captured = capsys.readouterr()
    assert waited == []
    assert "Ctrl-C again or Ctrl-D leaves." in captured.err
    assert "last answer" in captured.err
    assert "cached" not in captured.err
    first, _, *last = captured.out.splitlines()
    assert undisturbed.splitlines()[0] == first
    assert undisturbed.splitlines()[-1] == last[-1]


def test_rounds_without_text_can_be_stopped_too():
    asked = []

    silent = Round((0,), (TokenKind.TARGET,), 0, 0, (), None, None)

    def silent_rounds():
        try:
            while len(asked) < 100:
                yield RoundDone(silent)
        finally:
            asked.append("closed")

    def stop_wanted():
        asked.append("stop?")
        return len(asked) == 3

    assert watch(silent_rounds(), stop_wanted=stop_wanted) is None
    assert asked == ["stop?"] * 3 + ["closed"]


@pytest.fixture
def loop(toys_on_numpy, monkeypatch):
    """`loop(*lines)`: a conversation as in a terminal, in this process, greedily."""

    def converse(*lines):
        typed = iter(lines)

        def type_line(prompt=""):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", type_line)
        overrides = [*toys_on_numpy[1::2], *settings(**OWN_CACHE)[1::2], "speculative.temperature=0"]
        config = load_config(overrides=overrides).config
        ChatLoop(load_engine(config), AnswerOptions(config, system=""), AnswerWriter()).run_interactively()

    return converse


class Terminal:
    """A program in a terminal of its own: what it shows, and the keys that are pressed."""

    def __init__(self, *command: str) -> None:
        self.shown = ""
        self._seen = 0
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.execv(command[0], command)

    def wait_for(self, text: str) -> None:
        """Read until `text` is shown behind all that was waited for before."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.shown!r}"
            assert self._read(), f"the program left before {text!r}: {self.shown!r}"
        self._seen = self.shown.index(text, self._seen) + len(text)

    def press(self, keys: str) -> None:
        """Type `keys`."""
        os.write(self._terminal, keys.encode())

    def interrupt(self, until: str | None) -> None:
        """Press Ctrl-C at the prompt until `until` is shown, or with None until the program ends.

        Python's input() sees a signal late that comes between its prompt and its wait for a key: it needs
        another one then.
        """
        shown = len(self.shown)
        self.press("\x03")
        while until is None or until not in self.shown[shown:]:
            if not self._readable(AGAIN_S):
                self.press("\x03")
            elif not self._read():
                break
        assert until is None or until in self.shown[shown:], self.shown
        self._seen = len(self.shown)

    def exit_status(self) -> int:
        """Read to the end."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])

    def kill(self) -> None:
        """End the program if it is still there."""
        os.close(self._terminal)
        try:
            if os.waitpid(self._process, os.WNOHANG) == (0, 0):
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
        except ChildProcessError:
            return

    def _readable(self, patience_s: float) -> bool:
        return bool(select.select([self._terminal], [], [], patience_s)[0])

    def _read(self) -> bool:
        if not self._readable(PATIENCE_S):
            return False
        try:
            data = os.read(self._terminal, 1 << 16)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self.shown += data.decode("utf-8", errors="replace")
        return bool(data)


@pytest.fixture
def terminal(toys_on_numpy, tmp_path, monkeypatch):
    """A chat in a terminal whose answers are 3000 tokens long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    long = settings(**{"generation.max_tokens": 3000, "generation.min_tokens": 3000})
    program = Terminal(sys.executable, "-m", "draftloop", *map(str, toys_on_numpy), *long, "chat", "--color")
    yield program
    program.kill()


def test_interrupt_stops_the_answer_and_not_the_program(terminal):
    terminal.wait_for("\r\n> ")
    assert "colours: \x1b[32maccepted draft tokens" in terminal.shown
    for _ in range(2):
        terminal.press("hello\r")
        terminal.wait_for("\x1b[32m")  # the answer has begun: a draft token was accepted
        terminal.press("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("\r\n> ")
    terminal.interrupt(until="Ctrl-C again or Ctrl-D leaves.\r\n> ")
    terminal.press("/system\r")
    terminal.wait_for("system message: You are Qwen")
    terminal.wait_for("\r\n> ")
    terminal.interrupt(until="Ctrl-C again or Ctrl-D leaves.\r\n> ")
    terminal.interrupt(until=None)
    assert terminal.exit_status() == 0
    assert "Traceback" not in terminal.shown


def test_a_terminal_gets_a_mark_for_what_it_cannot_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    message = settings(**{"chat.system_message": "日本."})
    program = Terminal(sys.executable, "-m", "draftloop", *message, "config", "show")
    program.wait_for('"??."')
    assert program.exit_status() == 0


def test_end_of_input_leaves(terminal):
    terminal.wait_for("\r\n> ")
    terminal.press("\x04")
    assert terminal.exit_status() == 0
