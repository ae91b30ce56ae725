"""`draftloop stats`: what is stored, in words and as one JSON object."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_runner import settings

from draftloop.storage.store import open_store
from reporting.sample import PAIR, sample_requests, write_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli_runner import Result


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    write_store(directory, sample_requests(60))
    return directory


def options(directory: Path, **more: object) -> list[str]:
    """Global options that choose the store and its pair."""
    pair = {"models.target.name": PAIR.target, "models.draft.name": PAIR.draft}
    return settings(**{**pair, "storage.directory": directory, **more})


def test_json_is_one_object_with_the_counts(draftloop: Callable[..., Result], directory: Path) -> None:
    found = draftloop(*options(directory), "stats", "--json").json
    assert found["exists"]
    assert found["directory"] == str(directory)
    assert found["models"] == {"target": PAIR.target, "draft": PAIR.draft}
    assert (found["requests"], found["drafted_requests"]) == (60, 48)
    assert found["failures"] + found["replay"] + found["held_out"] == 60
    assert found["min_failure_cases"] == 50
    assert f"{found['failures']} of 50" in found["training"]
    assert 0 < found["alpha"] < 1 < found["tau"] < 5
    assert found["now"] == found["bare_draft"]
    assert found["domains"].keys() == {"ship's log", "code", "system 9f86d081"}
    assert found["adapter"] is None
    assert set(found["adapters"].values()) == {0}


def test_words_tell_the_same(draftloop: Callable[..., Result], directory: Path) -> None:
    found = draftloop(*options(directory), "stats", "--json").json
    result = draftloop(*options(directory), "stats")
    assert (result.exit_status, result.err) == (0, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert ["held", "out", str(found["held_out"]), f"({found['validation']}", "validate,"] in [
        line[:5] for line in lines
    ]
    assert not any(line.endswith(" ") for line in result.out.splitlines())
    assert any(line[:2] == ["failures", str(found["failures"])] for line in lines)
    for word in (
        "ship's log",
        f"alpha {found['alpha']:.3f}",
        "storage.max_megabytes = 1,024",
        found["training"],
    ):
        assert word in result.out


def test_the_threshold_is_that_of_the_settings(draftloop: Callable[..., Result], directory: Path) -> None:
    def found(setting: object) -> dict[str, float]:
        key = {"speculative.acceptance_threshold": setting}
        return draftloop(*options(directory, **key), "stats", "--json").json

    assert found(1.0)["failures"] > found(0.5)["failures"] > found(0.0)["failures"] == 0
    automatic = found("auto")
    assert 0 < automatic["acceptance_threshold"] < 1
    assert 5 <= automatic["failures"] <= 15
    key = {"speculative.acceptance_threshold": 1.0, "training.min_failure_cases": 3}
    ready = draftloop(*options(directory, **key), "stats", "--json").json
    assert "draftloop train can begin" in ready["training"]


def test_a_threshold_that_few_fall_below_is_pointed_out(
    draftloop: Callable[..., Result], directory: Path
) -> None:
    key = {"speculative.acceptance_threshold": 0.05, "training.min_failure_cases": 20}
    assert "acceptance_threshold: auto" in draftloop(*options(directory, **key), "stats").out


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_no_store_is_told_and_made_by_nobody(
    draftloop: Callable[..., Result], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    missing = tmp_path / "missing"
    result = draftloop(*options(missing), "stats", *flags)
    assert result.exit_status == 0, result.err
    assert str(missing) in result.out
    assert not missing.exists()
    if flags:
        assert result.json == {"directory": str(missing), "exists": False}


def test_an_empty_store_has_no_figures(draftloop: Callable[..., Result], tmp_path: Path) -> None:
    open_store(tmp_path, max_megabytes=1).close()
    assert "no request with drafts" in draftloop(*options(tmp_path), "stats").out
    found = draftloop(*options(tmp_path), "stats", "--json").json
    assert (found["requests"], found["alpha"], found["tau"], found["blocks"]) == (0, None, None, [])


def test_another_pairs_requests_are_named(draftloop: Callable[..., Result], directory: Path) -> None:
    result = draftloop(*options(directory, **{"models.draft.name": "package:other"}), "stats")
    assert f"{PAIR.target} with {PAIR.draft}: 60 requests" in result.out
    told, command = result.err.splitlines()
    assert "nothing is stored of this pair" in told
    assert command.startswith("  60 requests: draftloop ")
    words = shlex.split(command.partition(": draftloop ")[2])
    assert draftloop(*words, "--json").json["requests"] == 60


def test_suffix_matches_are_told_where_there_were_any(
    draftloop: Callable[..., Result], directory: Path, tmp_path: Path
) -> None:
    matched = {
        "suffix_rounds": 4,
        "suffix_tokens": 30,
        "suffix_drafted_tokens": 40,
        "suffix_accepted_tokens": 26,
        "suffix_s": 0.5,
    }
    # The first 12 asked the target alone; where matches proposed, that is no matter.
    write_store(tmp_path, [replace(one, **matched) for one in sample_requests(20)])
    found = draftloop(*options(tmp_path), "stats", "--json").json
    suffix = found["suffix"]
    assert (suffix["rounds"], suffix["tokens"]) == (80, 600)
    assert (suffix["acceptance_rate"], suffix["tau"], suffix["tokens_per_s"]) == (0.65, 7.5, 60.0)
    assert suffix["share"] == pytest.approx(600 / found["tokens"], abs=1e-4)
    told = "520 of 800 proposed tokens kept, 7.50 tokens a round, 60.0 a second in them"
    assert told in draftloop(*options(tmp_path), "stats").out
    page = Path(draftloop(*options(tmp_path), "report").out.strip()).read_text(encoding="utf-8")
    assert told in page
    assert "of all tokens from matches" not in draftloop(*options(directory), "stats").out


def test_it_reads_while_another_process_writes(draftloop: Callable[..., Result], tmp_path: Path) -> None:
    write_store(tmp_path, sample_requests(20))
    with open_store(tmp_path, max_megabytes=100) as writer, writer.transaction():
        writer.requests.add(sample_requests(21)[-1])
        assert draftloop(*options(tmp_path), "stats", "--json").json["requests"] == 20
    assert draftloop(*options(tmp_path), "stats", "--json").json["requests"] == 21


def test_a_damaged_store_fails_with_a_remedy(draftloop: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "draftloop.sqlite").write_bytes(b"no database at all" * 100)
    draftloop(*options(tmp_path), "stats").assert_fails(1, "draftloop.sqlite")
