"""`draftloop demo`: the whole circle on toys, what it says of it, and what it leaves behind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cli_runner import settings
from cli_store import opened, stored_requests

from draftloop.cli import demo_show
from draftloop.cli.demo import HELD_OUT
from draftloop.cli.traffic import SYSTEM, quartermaster_prompts
from draftloop.cli.training_progress import TrainingBars
from draftloop.config import Config
from draftloop.engine import Engine
from draftloop.learning.circle import Outcome
from draftloop.storage.records import PairKey, RunPoint

FOLDER = Path("data") / "demo"
REQUESTS = 30


@pytest.fixture
def demo(draftloop, toy_pair, monkeypatch):
    """`demo(*arguments, options=…)` with a toy pair that can learn, on PyTorch; it is never long."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target, draft = toy_pair(noise=0.1)
    toys = settings(
        backend="torch",
        **{
            "models.target.name": target,
            "models.draft.name": draft,
            "generation.max_tokens": 10,
            "training.num_epochs": 1,
        },
    )

    def call(*arguments, options=()):
        return draftloop(*toys, *options, "demo", "--requests", REQUESTS, *arguments)

    return call


def test_the_whole_circle(demo, draftloop, toy_pair, monkeypatch):
    asked = []
    stream = Engine.stream

    def listen(engine, request, *others):
        asked.append((request, engine.adapter))
        return stream(engine, request, *others)

    monkeypatch.setattr(Engine, "stream", listen)
    result = demo()
    assert result.exit_status == 0, result.err

    assert all(request.sampling.greedy for request, _ in asked)
    collected = [request for request, _ in asked if request.provenance is not None]
    others = [(request, adapter) for request, adapter in asked if request.provenance is None]
    assert len(collected) == len({tuple(request.prompt_tokens) for request in collected}) == REQUESTS
    held_out = others[-3 * HELD_OUT :]
    learnt = {tuple(request.prompt_tokens) for request in collected}
    assert not learnt & {tuple(request.prompt_tokens) for request, _ in held_out}
    ways = [(request.num_draft_tokens, adapter) for request, adapter in held_out]
    assert ways == [(0, None), (4, None), (4, "a0001")] * HELD_OUT

    with opened(FOLDER) as store:
        pair = PairKey(*map(str, toy_pair(noise=0.1)))
        (adapter,) = store.adapters.list(pair)
        (run,) = store.runs.list(pair)
        active = store.adapters.active(pair)
    assert len(stored_requests(FOLDER)) == REQUESTS
    assert {record.domain for record in stored_requests(FOLDER)} == {"quartermaster"}
    promoted = "The gate PROMOTES the adapter a0001" in result.out
    assert promoted == (adapter.status == run.status == "promoted") == (active is not None)
    assert promoted != ("The gate REFUSES the adapter a0001" in result.out)
    assert run.result["reason"] in result.out

    rows = {line[:12].strip(): line[12:].split() for line in result.out.splitlines()}
    for way in demo_show.WAYS:
        assert rows[way][-3:] == [str(HELD_OUT), "of", str(HELD_OUT)]
    assert "training.learning_rate = 0.0005" in " ".join(result.out.split())
    assert "generation.max_tokens = 10" in " ".join(result.out.split())
    report = Path(re.search(r"The report, for a browser: (.*)", result.out)[1])
    assert report.parent == Path.cwd() / FOLDER / "reports"
    page = report.read_text(encoding="utf-8")
    assert "a0001" in page
    assert f"{HELD_OUT} requests that the draft has never seen" in page
    for way in demo_show.WAYS:
        assert f'<th scope="row">{way}</th><td class="n" data-label="tok/s">{rows[way][0]}</td>' in page
    assert "K is fixed here" in result.out
    assert len(re.findall(r"^\(\d+ s\)$", result.out, re.MULTILINE)) == 4

    command = re.search(r"^  \S+ (.*) stats$", result.out, re.MULTILINE)[1]
    left = draftloop(*shlex.split(command), "stats", "--json").json
    assert (left["exists"], left["directory"]) == (True, str(Path.cwd() / FOLDER))
    # Counted as the demo counts them, not as the settings' defaults would.
    assert (left["acceptance_threshold"], left["min_failure_cases"]) == (0.9, 8)


def test_the_last_demo_is_forgotten_and_nothing_else(demo, draftloop, monkeypatch):
    def refuse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("draftloop.loading.prepare", refuse)
    FOLDER.mkdir(parents=True)
    (FOLDER / "thesis.txt").write_text("mine")
    demo().assert_wrong_input(str(FOLDER), "storage.directory")
    assert (FOLDER / "thesis.txt").read_text() == "mine"
    (FOLDER / "thesis.txt").unlink()
    assert demo().exit_status == 130
    opened(FOLDER).close()
    (FOLDER.parent / "kept.txt").write_text("mine")
    result = demo()
    assert result.exit_status == 130
    assert "forgotten" in result.out
    assert not FOLDER.exists()
    assert (FOLDER.parent / "kept.txt").read_text() == "mine"


def test_a_demo_that_runs_elsewhere_is_left_alone(demo):
    from filelock import FileLock

    from draftloop.learning.circle import LOCK_NAME

    opened(FOLDER).close()
    with FileLock(FOLDER / LOCK_NAME):
        demo().assert_wrong_input("another demo is running")
    opened(FOLDER).close()


def test_it_runs_the_package_pair_unless_models_are_named(draftloop, monkeypatch):
    seen = []

    def refuse(config, *_, **__):
        seen.append((config.models.target.name, config.generation.max_tokens, config.training.learning_rate))
        raise KeyboardInterrupt

    monkeypatch.setattr("draftloop.loading.prepare", refuse)
    draftloop("demo")
    draftloop("demo", "--models", "config", "--max-tokens", 5)
    draftloop("--set", "models.target.name=a/b", "demo")
    draftloop("--set", "models.target.name=a/b", "demo", "--models", "package")
    draftloop(*settings(**{"training.learning_rate": 0.5, "generation.max_tokens": 9}), "demo")
    package, default = "package:qwen2.5-coder-1.5b-instruct", Config().models.target.name
    rate = seen[0][2]
    assert seen == [
        (package, 96, rate),
        (default, 5, rate),
        ("a/b", 96, rate),
        (package, 96, rate),
        (package, 9, 0.5),
    ]


def test_too_few_requests_are_refused(draftloop):
    draftloop("demo", "--requests", 5).assert_wrong_input("--requests")


def test_the_traffic_is_many_different_prompts_in_one_order():
    assert len(set(quartermaster_prompts(250))) == 250
    assert quartermaster_prompts(40) == quartermaster_prompts(250)[:40]
    assert "Petrel" in SYSTEM
    with pytest.raises(ValueError, match="251"):
        quartermaster_prompts(251)


FIGURES = {
    "run": 1,
    "adapter": "a0001",
    "examples": 29,
    "steps": 24,
    "seconds": 100.4,
    "alpha_before": 0.7,
    "alpha_after": 0.75,
    "tau_before": 2.5,
    "tau_after": 2.75,
    "gain": 0.07,
    "gain_ci95": (0.02, 0.12),
}


def test_the_verdict_is_told_as_it_is(capsys):
    demo_show.say_verdict(Outcome("promoted", "it is better", **FIGURES))
    promoted = capsys.readouterr().out
    assert "24 steps on 29 requests in 100 s. The gate PROMOTES the adapter a0001: it is better" in promoted
    assert "alpha 0.700 → 0.750 · tau 2.50 → 2.75 · tokens/s +7.0% (95 %: +2.0% to +12.0%)" in promoted
    refused = Outcome("rejected", "it is worse", **FIGURES)
    demo_show.say_verdict(refused)
    assert "The gate REFUSES the adapter a0001: it is worse" in capsys.readouterr().out
    assert "refused" in demo_show.rivals(refused)
    demo_show.say_verdict(Outcome("skipped", "3 of 8 failures are there"))
    assert capsys.readouterr().out == "\nNothing was trained: 3 of 8 failures are there\n"


def test_the_training_tells_a_line_for_each_validation(capsys):
    with TrainingBars() as bars:
        bars.planned(20, 4)
        bars.point(RunPoint(4, 0.5, None, None, None, 0.7))
        for step, loss in ((5, 0.5), (6, 0.3)):
            bars.point(RunPoint(step, 0.6, loss, 1e-4, 1.0, None))
        bars.point(RunPoint(7, 0.7, None, 1e-4, None, None))
        bars.point(RunPoint(7, 0.7, None, None, None, 0.75))
        bars.note("two requests were left out")
        bars.judging(6, 16)
        bars.judged(0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training: 20 steps, from step 5 on",
        "step 4 of 20: validation alpha 0.700",
        "step 7 of 20: loss 0.400 · validation alpha 0.750 (0.700 at the start) · 1 steps skipped",
        "note: two requests were left out",
        "choosing a form on 16 requests, judging on 6 held-out ones",
    ]
    with TrainingBars(quiet=True) as bars:
        bars.planned(3, 0)
        bars.judging(2, 1)
        bars.note("only this")
    assert capsys.readouterr().err == "note: only this\n"
