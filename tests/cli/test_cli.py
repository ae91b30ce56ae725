"""The program as a whole: global options, exit statuses, what a failure looks like."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys

import pytest
from cli_runner import settings

from draftloop.cli import config, prompts

HEAVY = {"torch", "mlx", "transformers", "huggingface_hub", "numpy", "rich.progress"}


def test_help_and_usage_errors_import_nothing_heavy():
    program = (
        "import sys; from draftloop.cli.main import run\n"
        "assert run(['generate', '--help']) == 0\n"
        "assert run(['generate', '--nonsense']) == 2\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_without_a_command_the_help_is_shown(draftloop):
    result = draftloop()
    assert result.exit_status == 0
    for command in ("generate", "chat", "demo", "doctor", "models", "config"):
        assert f"\n  {command} " in result.out


def test_version(draftloop):
    from importlib.metadata import version

    assert draftloop("--version").out == f"draftloop {version('draftloop')}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nonsense"], "nonsense"),
        (["generate", "--nonsense"], "--nonsense"),
        (["generate", "a", "b"], "b"),
        (["generate", "a", "--max-tokens", "many"], "'--max-tokens': 'many' is not a whole number. See"),
        (["generate", "a", "--top-p", "most"], "'--top-p': 'most' is not a number. See"),
        (["serve", "--port", "abc"], "'--port': 'abc' is not a whole number. See draftloop serve --help."),
        (["generate", "a", "--max-tokens"], "--max-tokens"),
        (["generate", "a", "--seed", "-1"], "--seed"),
        (["models"], "models --help"),
        (["models", "import"], "FILE"),
        (["--config"], "--config"),
        (["generate", "a", "--config", "x.yaml"], "before the command"),
        (["generate", "a", "--set", "backend=numpy"], "before the command"),
        (["--config", "x.yaml", "generate", "--nonsense"], "See draftloop generate --help."),
        (["--set", "backend=numpy", "models", "pull", "--nonsense"], "See draftloop models pull --help."),
        (["--set", "backend=numpy", "nonsense"], "See draftloop --help."),
    ],
)
def test_usage_errors_are_one_line(draftloop, arguments, word):
    draftloop(*arguments).assert_wrong_input(word)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\x00\x01\x02", "config.yaml"),
        (b"speculative:\n\tnum_draft_tokens: 4\n", "config.yaml:2"),
        (b"caf\xe9: 1\n", "config.yaml"),
        (b"- a\n- b\n", "config.yaml"),
        (b"speculative:\n  num_draft_token: 4\n", "num_draft_tokens"),
        (b"speculative: {num_draft_tokens: 0}\n", "num_draft_tokens = 0"),
    ],
)
def test_a_config_that_cannot_be_used(draftloop, tmp_path, content, word):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    draftloop("--config", file, "config", "show").assert_wrong_input(word)


def test_a_config_that_is_missing_or_a_folder(draftloop, tmp_path):
    draftloop("--config", tmp_path / "none.yaml", "config", "show").assert_wrong_input("none.yaml")
    draftloop("--config", tmp_path, "generate", "a").assert_wrong_input(str(tmp_path))


def test_a_wrong_override(draftloop):
    draftloop("--set", "nonsense", "config", "show").assert_wrong_input("nonsense")
    draftloop("--set", "backend=none", "doctor").assert_wrong_input("backend")


def test_the_later_of_two_files_wins_and_set_wins_over_both(draftloop, tmp_path):
    for name, drafts in (("a", 2), ("b", 3)):
        (tmp_path / f"{name}.yaml").write_text(f"speculative: {{num_draft_tokens: {drafts}, top_k: 7}}")
    options = [
        "--config",
        tmp_path / "a.yaml",
        "--config",
        tmp_path / "b.yaml",
        "--set",
        "speculative.top_k=9",
    ]
    shown = draftloop(*options, "config", "show", "--json").json
    assert shown["speculative.num_draft_tokens"]["value"] == 3
    assert shown["speculative.num_draft_tokens"]["origin"].endswith("b.yaml:1")
    assert shown["speculative.top_k"] == {"value": 9, "origin": "--set"}


def _break(monkeypatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(config, "new_table", fail)


def test_an_unexpected_error_is_one_line_and_the_traceback_is_a_setting_away(draftloop, monkeypatch):
    _break(monkeypatch, KeyError("broken\nwithin"))
    draftloop("config", "show").assert_fails(1, "KeyError", "logging.level=DEBUG")
    result = draftloop("--set", "logging.level=DEBUG", "config", "show")
    assert result.exit_status == 1
    assert "Traceback" in result.err


def test_an_interrupt_leaves_with_130(draftloop, monkeypatch):
    _break(monkeypatch, KeyboardInterrupt())
    result = draftloop("config", "show")
    assert (result.exit_status, result.err.strip()) == (130, "")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = [sys.executable, "-m", "draftloop", "config", "show"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_debug_has_a_traceback_of_failed_work_and_none_of_wrong_input(draftloop):
    def failed(name):
        names = {"logging.level": "DEBUG", "models.target.name": name}
        return draftloop(*settings(**names), "generate", "hi").err

    assert failed("package:nonsense").count("where it was raised") == 0
    assert "where it was raised\nTraceback" in failed("nobody/nothing")


def test_redirected_output_is_utf8_whatever_the_locale(tmp_path):
    message = settings(**{"chat.system_message": "日本 é"})
    result = subprocess.run(
        [sys.executable, "-m", "draftloop", *message, "--set", "ä=1", "config", "show"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        check=False,
    )
    assert "error: ä (--set) is not a setting" in result.stderr.decode("utf-8")
    shown = subprocess.run(
        [sys.executable, "-m", "draftloop", *message, "config", "show"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        check=True,
    )
    assert '"日本 é"' in shown.stdout.decode("utf-8")


def test_debug_shows_the_work(draftloop, toys_on_numpy):
    result = draftloop(*toys_on_numpy, *settings(**{"logging.level": "DEBUG"}), "generate", "hi")
    assert "debug: draftloop.member: round: " in result.err


def test_prompts_never_come_from_a_terminal_that_nobody_looks_at(monkeypatch):
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(prompts.sys, "stdin", Terminal())
    with pytest.raises(prompts.PromptError, match="there is no prompt"):
        prompts.read_prompt(None)


def test_the_log_goes_to_whatever_display_holds_stderr_by_now(draftloop, monkeypatch):
    """A display takes stderr over while it lives, and puts lines above itself."""
    draftloop("config", "show").assert_done()
    monkeypatch.setattr(sys, "stderr", display := io.StringIO())
    logging.getLogger("draftloop.anything").info("said")
    assert display.getvalue() == "note: said\n"
