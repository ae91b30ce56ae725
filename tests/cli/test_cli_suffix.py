"""Suffix matches through the command line: after a restart, by the settings, and in the benchmark's modes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import settings
from cli_store import stored_requests

from draftloop.speculation.costs import RoundCosts

ADAPTIVE = settings(**{"speculative.schedule": "adaptive", "generation.max_tokens": 40})
FLAT = RoundCosts(((1, 1.0), (17, 1.1)), draft_s=0.9, draft_round_s=0.0, read_s=0.0)
"""Rows are nearly free and drafting is dear: whatever is found again is worth a try."""


@pytest.fixture
def asked(draftloop, toys_on_numpy, monkeypatch):
    """`asked(command, *arguments, **settings)` under an adaptive schedule; each call begins anew."""
    calibrated = []

    def costs(_pair, rounds, _facts):
        calibrated.append(rounds.num_suffix_tokens)
        return FLAT

    monkeypatch.setattr("draftloop.loading.calibrated_costs", costs)

    def call(command, *arguments, **changed):
        options = [*toys_on_numpy, *ADAPTIVE, *settings(**changed)]
        return draftloop(*options, command, "--temperature", 0, "--json", *arguments)

    call.calibrated = calibrated
    return call


def test_answers_of_an_earlier_process_are_drafted_from(asked):
    first, again = (asked("generate", "hello").json for _ in range(2))
    assert again["token_ids"] == first["token_ids"]
    assert again["suffix_accepted_tokens"] > first["suffix_accepted_tokens"]
    assert again["rounds"] < first["rounds"]
    assert again["tau"] == pytest.approx(again["completion_tokens"] / again["rounds"], abs=1e-4)
    assert again["suffix_rounds"] <= again["rounds"]
    *_, record = stored_requests(Path("data"))
    assert record.suffix_accepted_tokens == again["suffix_accepted_tokens"]


@pytest.mark.parametrize(
    "changed",
    [{"speculative.suffix.megabytes": 0}, {"storage.collect": "false"}],
    ids=["no room", "not collecting"],
)
def test_without_memory_each_process_begins_anew(asked, changed):
    first = asked("generate", "hello", **changed).json
    asked("generate", "hello")
    assert asked("generate", "hello", **changed).json["rounds"] == first["rounds"]


@pytest.mark.parametrize(
    "changed", [{"speculative.suffix.enabled": "false"}, {"speculative.schedule": "fixed"}]
)
def test_switched_off_nothing_is_matched(asked, changed):
    for _ in range(2):
        figures = asked("generate", "hello", **changed).json
        assert (figures["suffix_rounds"], figures["suffix_drafted_tokens"]) == (0, 0)
    assert asked.calibrated in ([], [0, 0])


def test_a_match_is_no_longer_than_the_setting_says(asked):
    asked("generate", "hello")
    longest = {}
    for most in (2, 15):
        figures = asked(
            "generate", "hello", "--no-collect", **{"speculative.suffix.max_draft_tokens": most}
        ).json
        longest[most] = figures["suffix_drafted_tokens"] / figures["suffix_rounds"]
    assert longest[2] <= 2 < longest[15]
    assert asked.calibrated == [15, 2, 15]


def test_the_benchmark_measures_the_parts_apart_and_together(asked, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("hello", "hello")), encoding="utf-8")
    names = ["target", "draft", "suffix", "speculative"]
    figures = asked("benchmark", "--prompts", file, "--modes", ",".join(names)).json
    assert list(figures["modes"]) == names
    assert {"speculative/draft", "speculative/suffix", "suffix/target"} <= figures["ratios"].keys()
    modes = figures["modes"]
    assert modes["target"]["tau"] == 1 < modes["suffix"]["tau"]
    assert modes["suffix"]["alpha"] is None
    assert "suffix matches" in modes["suffix"]["is"]
    assert "suffix" not in modes["draft"]["is"]


def test_measuring_matches_needs_them(asked, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a", encoding="utf-8")
    result = asked(
        "benchmark", "--prompts", file, "--modes", "suffix", **{"speculative.suffix.enabled": "false"}
    )
    result.assert_wrong_input("--modes suffix", "speculative.suffix.enabled", "adaptive")
