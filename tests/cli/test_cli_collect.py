"""`draftloop collect`: what it stores, skips and tells, and how it stops and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import settings
from cli_store import add_adapter, stored_requests

from draftloop.batch import Batch

DATA = Path("data")
TEXTS = ("one", "two", "three", "four", "five")


@pytest.fixture
def collect(draftloop, toys_on_numpy):
    """`collect(*arguments, options=…)` with the toy pair."""

    def call(*arguments, options=()):
        return draftloop(*toys_on_numpy, *options, "collect", *arguments)

    return call


@pytest.fixture
def prompts(tmp_path):
    """A file of five prompts, the first three with a task."""
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": text, **({"task": "count"} if i < 3 else {})} for i, text in enumerate(TEXTS)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def test_each_prompt_is_answered_and_stored(collect, draftloop, toys_on_numpy, prompts):
    figures = collect("--prompts", prompts, "--temperature", 0, "--json").json
    records = stored_requests(DATA)
    assert figures["prompts"] == figures["answered"] == len(records) == 5
    assert sorted(record.domain == "count" for record in records) == [False, False, True, True, True]
    assert {record.source for record in records} == {"collect"}
    assert len({record.key for record in records}) == 5
    assert figures["completion_tokens"] == sum(len(record.answer_tokens) for record in records)
    drafted, accepted = (
        sum(getattr(r, f"{name}_tokens") for r in records) for name in ("drafted", "accepted")
    )
    assert figures["acceptance_rate"] == pytest.approx(accepted / drafted, abs=1e-4)
    assert figures["tau"] == pytest.approx(
        figures["completion_tokens"] / sum(record.rounds for record in records), abs=1e-4
    )
    alone = [
        draftloop(*toys_on_numpy, "generate", text, "--temperature", 0, "--no-collect", "--json").json
        for text in TEXTS
    ]
    # They are made together and stored as they end.
    told = sorted(tuple(record.answer_tokens) for record in records)
    assert told == sorted(tuple(one["token_ids"]) for one in alone)


def test_the_summary_says_what_waits_and_what_is_next(collect, prompts):
    low = settings(**{"speculative.acceptance_threshold": 1.0, "training.min_failure_cases": 3})
    result = collect("--prompts", prompts, "--temperature", 0, options=low)
    assert result.exit_status == 0, result.err
    assert "5 prompts" in result.out
    assert "tok/s" in result.out
    assert "5 of these answers are failures (acceptance_rate below 1.00)" in result.out
    assert result.out.endswith("Next: draftloop train\n")
    assert "collecting: 5 of 5 · alpha" in result.err
    high = settings(**{"speculative.acceptance_threshold": 1.0, "training.min_failure_cases": 30})
    again = collect("--prompts", prompts, "--temperature", 0, options=high)
    assert "5 of 5 prompts were collected before" in again.out
    assert "30 are needed (training.min_failure_cases)" in again.out


def test_failures_are_counted_by_the_threshold(collect, prompts):
    def figures(threshold):
        options = settings(**{"speculative.acceptance_threshold": threshold})
        return collect("--prompts", prompts, "--temperature", 0, "--again", "--json", options=options).json

    assert figures(0.0)["failures"] == 0
    everything = figures(1.0)
    assert everything["failures"] == 5
    # Of each domain's first five prompts one is held out, which may be one that is not there.
    assert 10 - everything["failures_waiting"] in (0, 2, 4)
    automatic = figures("auto")
    assert 0 < automatic["acceptance_threshold"] < 1
    assert automatic["failures"] < 5


def test_what_is_stored_is_skipped_unless_asked_again(collect, prompts):
    collect("--prompts", prompts).assert_done()
    with prompts.open("a", encoding="utf-8") as file:
        file.write('\n{"prompt": "six"}\n{"prompt": "six", "task": "another"}\n{"prompt": "one"}')
    more = collect("--prompts", prompts, "--json").json
    assert (more["prompts"], more["collected_before"], more["repeated"], more["answered"]) == (8, 6, 1, 1)
    nothing = collect("--prompts", prompts, "--json").json
    assert (nothing["collected_before"], nothing["answered"], nothing["tau"]) == (8, 0, None)
    assert collect("--prompts", prompts, "--again", "--json").json["answered"] == 6
    assert len(stored_requests(DATA)) == 12


def test_a_prompt_is_another_one_with_another_system_message_or_sampling_but_not_with_another_k(
    collect, prompts
):
    collect("--prompts", prompts).assert_done()

    def answered(*flags):
        return collect("--prompts", prompts, *flags, "--json").json["answered"]

    assert answered("--num-draft-tokens", 2) == 0
    assert answered("--seed", 3, "--max-tokens", 5) == 0
    assert answered("--system", "be brief") == 5
    assert answered("--temperature", 0.1) == 5


def test_another_pair_collects_for_itself(collect, prompts, toy_pair):
    collect("--prompts", prompts).assert_done()
    _, other = toy_pair(noise=0.3)
    options = settings(**{"models.draft.name": other})
    assert collect("--prompts", prompts, "--json", options=options).json["answered"] == 5


def test_nothing_is_loaded_where_everything_is_stored(collect, prompts, monkeypatch):
    collect("--prompts", prompts).assert_done()

    def refuse(*_, **__):
        raise AssertionError("a model was prepared")

    monkeypatch.setattr("draftloop.loading.prepare", refuse)
    assert collect("--prompts", prompts).exit_status == 0


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_ends_after_the_answer_and_the_same_command_goes_on(collect, prompts, monkeypatch, as_json):
    import signal

    join, joined = Batch.join, []

    def press_at_the_second(batch, request, conversation=None):
        joined.append(request)
        if len(joined) == 2:
            signal.raise_signal(signal.SIGINT)
        return join(batch, request, conversation)

    monkeypatch.setattr(Batch, "join", press_at_the_second)
    stopped = collect("--prompts", prompts, *(["--json"] if as_json else []))
    assert stopped.exit_status == 130
    assert "goes on from there" in stopped.err
    assert len(stored_requests(DATA)) == 2
    if as_json:
        figures = json.loads(stopped.out)
        assert (figures["interrupted"], figures["answered"]) == (True, 2)
    monkeypatch.undo()


def test_a_second_ctrl_c_does_not_wait(collect, prompts, monkeypatch):
    import signal

    step, steps = Batch.step, []

    def impatient(batch):
        steps.append(batch)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(batch)

    monkeypatch.setattr(Batch, "step", impatient)
    assert collect("--prompts", prompts, "--min-tokens", 12).exit_status == 130
    told = {(record.finish_reason, record.key) for record in stored_requests(DATA)}
    assert told == {("cancelled", None)}


def test_it_goes_on_where_ctrl_c_ended_it(collect, prompts, monkeypatch):
    import signal

    join = Batch.join

    def press(batch, request, conversation=None):
        signal.raise_signal(signal.SIGINT)
        return join(batch, request, conversation)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "join", press)
        collect("--prompts", prompts)
    rest = collect("--prompts", prompts, "--json").json
    assert (rest["collected_before"], rest["answered"], rest["interrupted"]) == (1, 4, False)


def test_the_adapter_is_stored_beside_each_answer(collect, prompts, toy_pair):
    name = add_adapter_before_any(toy_pair)
    assert collect("--prompts", prompts, "--json").json["adapter"] == name
    assert collect("--prompts", prompts, "--again", "--adapter", "none", "--json").json["adapter"] is None
    assert [record.adapter for record in stored_requests(DATA)] == [name] * 5 + [None] * 5


def add_adapter_before_any(toy_pair):
    DATA.mkdir()
    return add_adapter(DATA, toy_pair(), promote=True)


def test_wrong_input(collect, prompts, tmp_path):
    collect().assert_wrong_input("--prompts")
    collect("--prompts", tmp_path / "none.txt").assert_wrong_input("none.txt")
    never = settings(**{"storage.collect": "false"})
    collect("--prompts", prompts, options=never).assert_wrong_input("storage.collect is false")
    collect("--prompts", prompts, "--adapter", "a0009").assert_wrong_input("'a0009'")


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_loaded(collect, prompts, monkeypatch):
    with prompts.open("a", encoding="utf-8") as file:
        file.write('\n{"prompt": "' + "x" * 200 + '"}')

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("draftloop.loading.load_prepared", refuse)
    small = settings(**{"models.target.max_kv_cache_tokens": 130})
    collect("--prompts", prompts, options=small).assert_wrong_input(f"{prompts}:6", "max_kv_cache_tokens")


def test_a_store_that_cannot_be_used(collect, prompts):
    DATA.write_bytes(b"a file where the folder should be")
    collect("--prompts", prompts).assert_fails(1, "draftloop.sqlite")
