"""`draftloop benchmark`: the contract of its figures, peers in children, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import fake_peer
import pytest
from cli_runner import settings

from draftloop.benchmarking import peers

FIGURES = {"tokens_per_s", "tau", "alpha"}
RATIO = {"median", "low", "high"}


@pytest.fixture
def benchmark(draftloop, toys_on_numpy, monkeypatch):
    """`benchmark(*arguments, options=…)` with the toy pair and fake peers."""
    monkeypatch.setattr(peers, "PEERS", fake_peer.PEERS)
    monkeypatch.setattr(peers, "is_apple_silicon", lambda: False)

    def call(*arguments, options=()):
        return draftloop(*toys_on_numpy, *options, "benchmark", "--temperature", 0, *arguments)

    return call


@pytest.fixture
def prompts(tmp_path):
    """Two tasks and a prompt without one."""
    file = tmp_path / "p.jsonl"
    tasks = ("sums", "poems", "sums", None)
    lines = [{"prompt": "x" * (i + 1), **({"task": task} if task else {})} for i, task in enumerate(tasks)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def test_the_json_contract(benchmark, prompts, toy_pair):
    figures = benchmark("--prompts", prompts, "--json").json
    assert figures["prompts"] == 4
    assert list(figures["modes"]) == ["target", "speculative"]
    assert all(mode.keys() == {*FIGURES, "is"} for mode in figures["modes"].values())
    assert figures["ratios"].keys() == {"speculative/target"}
    assert figures["ratios"]["speculative/target"].keys() == RATIO
    assert figures["models"] == {"target": str(toy_pair()[0]), "draft": str(toy_pair()[1])}
    assert (figures["adapter"], figures["backend"]) == (None, "numpy")
    assert figures["machine"]["cores"] >= 1
    assert {"draftloop", "Python", "numpy"} <= figures["versions"].keys()
    assert list(figures["tasks"]) == ["sums", "poems", "no task"]
    assert {name: task["prompts"] for name, task in figures["tasks"].items()} == {
        "sums": 2, "poems": 1, "no task": 1,
    }  # fmt: skip
    for task in figures["tasks"].values():
        assert task["modes"]["speculative"].keys() == FIGURES
        assert task["ratios"]["speculative/target"].keys() == RATIO
    assert figures["tasks"]["poems"]["ratios"]["speculative/target"]["low"] is None
    low, middle, high = (figures["ratios"]["speculative/target"][name] for name in ("low", "median", "high"))
    assert 0 < low <= middle <= high


def test_tau_and_alpha_are_those_of_evaluate(benchmark, draftloop, toys_on_numpy, prompts):
    modes = benchmark("--prompts", prompts, "--json").json["modes"]
    judged = draftloop(*toys_on_numpy, "evaluate", "--prompts", prompts, "--temperature", 0, "--json").json
    assert (modes["speculative"]["tau"], modes["speculative"]["alpha"]) == (judged["tau"], judged["alpha"])
    assert (modes["target"]["tau"], modes["target"]["alpha"]) == (1, None)


def test_a_peer_answers_from_a_child_and_its_best_mode_is_told(benchmark, prompts):
    figures = benchmark("--prompts", prompts, "--against", "fake", "--json", "--num-draft-tokens", 3).json
    assert list(figures["modes"]) == ["target", "speculative", "fake", "fake+draft", "fake best"]
    assert figures["modes"]["fake"]["is"] == "fake, alone, 3 draft tokens"
    assert figures["modes"]["fake+draft"]["is"] == "fake, drafting, 3 draft tokens"
    assert figures["modes"]["fake best"]["tokens_per_s"] == 10
    assert {figures["modes"][name]["tokens_per_s"] for name in ("fake", "fake+draft")} <= {5, 7.5, 10}
    assert all(task["ratios"].keys() == figures["ratios"].keys() for task in figures["tasks"].values())
    assert figures["ratios"].keys() == {
        "speculative/target", "fake/target", "fake+draft/target", "fake+draft/fake",
        "speculative/fake", "speculative/fake+draft", "fake best/target", "speculative/fake best",
    }  # fmt: skip


def test_modes_of_peers_can_be_named_alone(benchmark, prompts):
    figures = benchmark("--prompts", prompts, "--modes", "fake+draft,fake", "--json").json
    assert list(figures["modes"]) == ["fake+draft", "fake", "fake best"]
    assert figures["ratios"].keys() == {"fake/fake+draft"}
    assert figures["modes"]["fake"]["tau"] == 2


def test_installed_peers_are_those_that_can_run_here(benchmark, prompts):
    result = benchmark("--prompts", prompts, "--against", "installed", "--json")
    assert list(result.json["modes"]) == ["target", "speculative", "fake", "fake+draft", "fake best"]
    assert "note: without gguf" in result.err


def test_a_peer_that_is_not_here_or_cannot_read_the_pair(benchmark, prompts):
    benchmark("--prompts", prompts, "--against", "absent").assert_wrong_input("absent", "pip install absent")
    benchmark("--prompts", prompts, "--modes", "absent").assert_wrong_input("absent", "pip install absent")
    benchmark("--prompts", prompts, "--against", "gguf").assert_wrong_input("GGUF", "models.target.name")
    benchmark("--prompts", prompts, "--against", "vllm").assert_wrong_input("vllm", "fake, broken")


def test_a_peer_that_fails_is_named_with_what_it_said(benchmark, prompts, toy_pair):
    result = benchmark("--prompts", prompts, "--against", "broken")
    result.assert_fails(1, "broken failed: RuntimeError: no room for target", "Leave it out")
    result = benchmark("--prompts", prompts, "--against", "dying", "--max-tokens", fake_peer.MARKED_TOKENS)
    result.assert_fails(1, "dying failed: its process ended with exit code 3")


def test_limit_counts_by_task(benchmark, prompts):
    tasks = benchmark("--prompts", prompts, "--limit", 1, "--json").json["tasks"]
    assert {name: task["prompts"] for name, task in tasks.items()} == {"sums": 1, "poems": 1, "no task": 1}


def test_the_tables_tell_what_json_tells(benchmark, prompts):
    result = benchmark("--prompts", prompts, "--modes", "fake,fake+draft")
    assert result.exit_status == 0, result.err
    rows = [line.split() for line in result.out.splitlines() if line.strip()]
    figures = benchmark("--prompts", prompts, "--modes", "fake,fake+draft", "--json").json
    fake = next(row for row in rows if row[0] == "fake")
    assert float(fake[1]) == figures["modes"]["fake"]["tokens_per_s"]
    every = next(row for row in rows if row[:3] == ["all", "4", "fake+draft/fake"])
    assert float(every[3]) == pytest.approx(figures["ratios"]["fake+draft/fake"]["median"], abs=6e-3)
    assert "reading the prompt counts for no mode" in result.out
    assert "measuring: 8 of 8" in result.err


def test_the_plot_has_a_bar_for_each_ratio_of_each_task(benchmark, prompts):
    benchmark("--prompts", prompts, "--against", "fake", "--plot", "ratios.svg").assert_done()
    svg = ElementTree.parse("ratios.svg").getroot()
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    ratios = ["speculative/target", "speculative/fake", "speculative/fake+draft", "speculative/fake best"]
    assert [text for text in texts if text in ratios] == ratios
    assert [text for text in texts if text.endswith(")")] == [
        "sums (2)",
        "poems (1)",
        "no task (1)",
        "all (4)",
    ]
    rectangles = list(svg.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(rectangles) == 1 + len(ratios) + 4 * len(ratios)


def test_wrong_input_is_found_before_a_model_is_loaded(benchmark, prompts, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("draftloop.cli.benchmark.load_models", load)
    benchmark().assert_wrong_input("--prompts")
    benchmark("--prompts", tmp_path / "none.txt").assert_wrong_input("none.txt")
    benchmark("--prompts", prompts, "--modes", "fast").assert_wrong_input(
        "--modes fast", "target, speculative"
    )
    benchmark("--prompts", prompts, "--modes", "target,").assert_wrong_input("empty name")
    benchmark("--prompts", prompts, "--plot", "chart.pdf").assert_wrong_input("chart.pdf", "SVG")
    benchmark("--prompts", prompts, "--plot", "nowhere/c.svg").assert_wrong_input("nowhere")
    benchmark("--prompts", prompts, "--limit", 0).assert_wrong_input("--limit")


def test_the_target_alone_needs_no_draft(benchmark, prompts, tmp_path):
    options = settings(**{"models.draft.name": tmp_path / "no-draft"})
    figures = benchmark("--prompts", prompts, "--modes", "target", "--json", options=options).json
    assert list(figures["modes"]) == ["target"]
    assert figures["ratios"] == {}


def test_nothing_is_stored(benchmark, prompts):
    benchmark("--prompts", prompts, options=settings(**{"storage.collect": "true"})).assert_done()
    assert not Path("data").exists()
    assert list(Path().iterdir()) == []
