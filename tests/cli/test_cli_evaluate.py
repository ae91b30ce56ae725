"""`draftloop evaluate`: figures by task, one adapter throughout, nothing stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import settings
from cli_store import add_adapter, opened, stored_requests

DATA = Path("data")
FIGURES = {"prompts", "alpha", "tau", "acceptance_rate", "tokens_per_s"}


@pytest.fixture
def evaluate(draftloop, toys_on_numpy):
    """`evaluate(*arguments, options=…)` with the toy pair."""

    def call(*arguments, options=()):
        return draftloop(*toys_on_numpy, *options, "evaluate", *arguments)

    return call


@pytest.fixture
def prompts(tmp_path):
    """Two tasks and a prompt without one."""
    file = tmp_path / "p.jsonl"
    tasks = ("sums", "poems", "sums", None)
    lines = [{"prompt": f"prompt {i}", **({"task": task} if task else {})} for i, task in enumerate(tasks)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def test_the_json_contract(evaluate, prompts, toy_pair):
    figures = evaluate("--prompts", prompts, "--json").json
    assert figures.keys() == {*FIGURES, "answers_at_once", "tasks", "adapter", "models", "backend"}
    assert figures["prompts"] == figures["answers_at_once"] == 4
    assert list(figures["tasks"]) == ["sums", "poems", "no task"]
    assert {name: task["prompts"] for name, task in figures["tasks"].items()} == {
        "sums": 2, "poems": 1, "no task": 1,
    }  # fmt: skip
    assert all(task.keys() == FIGURES for task in figures["tasks"].values())
    assert (figures["adapter"], figures["backend"]) == (None, "numpy")
    assert figures["models"] == {"target": str(toy_pair()[0]), "draft": str(toy_pair()[1])}


def test_the_figures_are_those_of_the_answers(evaluate, draftloop, toys_on_numpy, prompts):
    figures = evaluate("--prompts", prompts, "--temperature", 0, "--json").json
    one_by_one = draftloop(
        *toys_on_numpy, "generate", "--prompts", prompts, "--temperature", 0, "--no-collect", "--json"
    ).json
    for name in ("alpha", "tau", "acceptance_rate"):
        assert figures[name] == one_by_one[name]
        assert figures["tasks"]["poems"][name] == one_by_one["results"][1][name]
    answers = [one for one in one_by_one["results"] if one.get("task") == "sums"]
    assert figures["tasks"]["sums"]["tau"] == pytest.approx(
        sum(a["completion_tokens"] for a in answers) / sum(a["rounds"] for a in answers), abs=1e-4
    )


ONE_AT_A_TIME = settings(**{"memory.answers_at_once": 1})


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_how_many_are_answered_at_once_changes_no_figure_but_the_speed(evaluate, prompts, temperature):
    flags = ("--prompts", prompts, "--temperature", temperature, "--json")
    together, alone = evaluate(*flags).json, evaluate(*flags, options=ONE_AT_A_TIME).json
    assert (together["answers_at_once"], alone["answers_at_once"]) == (4, 1)
    for figures in (together, alone, *together["tasks"].values(), *alone["tasks"].values()):
        figures.pop("tokens_per_s")
        figures.pop("answers_at_once", None)
    assert together == alone


def test_it_says_what_the_speed_is_the_speed_of(evaluate, prompts):
    assert "tok/s is of up to 4 answers together" in evaluate("--prompts", prompts).err
    assert "together" not in evaluate("--prompts", prompts, options=ONE_AT_A_TIME).err


def test_where_figures_depend_on_who_is_answered_beside_one_is_answered_at_a_time(evaluate, prompts):
    adaptive = settings(**{"speculative.schedule": "adaptive"})
    assert evaluate("--prompts", prompts, "--json", options=adaptive).json["answers_at_once"] == 1


def test_sampled_figures_are_the_same_twice(evaluate, prompts):
    def acceptance(*flags):
        figures = evaluate("--prompts", prompts, "--temperature", 1.2, "--json", *flags).json
        return figures["alpha"], figures["tau"]

    assert acceptance() == acceptance() == acceptance("--seed", 0) != acceptance("--seed", 1)


def test_the_table_has_a_row_for_each_task_and_one_for_all(evaluate, prompts):
    result = evaluate("--prompts", prompts, "--temperature", 0)
    assert result.exit_status == 0, result.err
    rows = [line.split() for line in result.out.splitlines() if line.strip()]
    figures = evaluate("--prompts", prompts, "--temperature", 0, "--json").json
    last = rows[-1]
    assert last[:2] == ["all", "4"]
    assert float(last[4]) == pytest.approx(figures["alpha"], abs=6e-4)
    assert float(last[5]) == pytest.approx(figures["tau"], abs=6e-3)
    assert float(last[6]) == pytest.approx(figures["acceptance_rate"], abs=6e-4)
    assert [row[0] for row in rows if row[0] in ("sums", "poems", "no")] == ["sums", "poems", "no"]
    assert "nothing was stored" in result.err


def test_nothing_is_stored(evaluate, draftloop, toys_on_numpy, prompts):
    evaluate("--prompts", prompts).assert_done()
    assert not DATA.exists()
    draftloop(*toys_on_numpy, "generate", "hi").assert_done()
    evaluate("--prompts", prompts, options=settings(**{"storage.collect": "true"})).assert_done()
    assert len(stored_requests(DATA)) == 1


def test_one_adapter_from_the_first_prompt_to_the_last(evaluate, prompts, toy_pair, monkeypatch):
    from draftloop.engine import Engine
    from draftloop.storage.records import PairKey

    DATA.mkdir()
    first = add_adapter(DATA, toy_pair(), promote=True)
    second = add_adapter(DATA, toy_pair(), promote=False, strength=0.1)
    undisturbed = evaluate("--prompts", prompts, "--json").json
    bare = evaluate("--prompts", prompts, "--adapter", "none", "--json").json
    named = evaluate("--prompts", prompts, "--adapter", second, "--json").json
    assert [figures["adapter"] for figures in (undisturbed, bare, named)] == [first, None, second]
    assert len({figures["alpha"] for figures in (undisturbed, bare, named)}) == 3
    complete = Engine.complete

    def promote_meanwhile(engine, request, conversation=None):
        with opened(DATA) as store:
            store.adapters.activate(PairKey(*map(str, toy_pair())), second)
        return complete(engine, request, conversation)

    monkeypatch.setattr(Engine, "complete", promote_meanwhile)
    disturbed = evaluate("--prompts", prompts, "--json").json
    assert (disturbed["adapter"], disturbed["alpha"]) == (first, undisturbed["alpha"])


def test_the_target_alone(evaluate, prompts):
    figures = evaluate("--prompts", prompts, "--no-speculation", "--json").json
    assert (figures["alpha"], figures["acceptance_rate"], figures["tau"]) == (None, None, 1)
    assert figures["models"]["draft"] is None


def test_a_store_that_cannot_be_read_costs_the_adapter_only(evaluate, prompts):
    DATA.mkdir()
    (DATA / "draftloop.sqlite").write_bytes(b"no database " * 100)
    result = evaluate("--prompts", prompts, "--json")
    assert result.json["adapter"] is None
    assert "note: the draft goes without an adapter" in result.err
    assert evaluate("--prompts", prompts, "--adapter", "none", "--json").json["adapter"] is None


def test_wrong_input(evaluate, prompts, tmp_path):
    evaluate().assert_wrong_input("--prompts")
    evaluate("--prompts", tmp_path / "none.txt").assert_wrong_input("none.txt")
    evaluate("--prompts", prompts, "--adapter", "a0001").assert_wrong_input("'a0001'")
    evaluate("--prompts", prompts, "--no-collect").assert_wrong_input("--no-collect")
