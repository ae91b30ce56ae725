"""`draftloop report`: one file, whole or not at all."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_runner import settings

from draftloop.models.tokenizer import Tokenizer
from draftloop.storage.records import PairKey
from draftloop.storage.store import open_store
from reporting.sample import PAIR, sample_requests, write_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli_runner import Result


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    write_store(directory, sample_requests(40))
    return directory


@pytest.fixture
def options(directory: Path) -> list[str]:
    """Global options that choose the store and its pair."""
    return settings(
        **{
            "models.target.name": PAIR.target,
            "models.draft.name": PAIR.draft,
            "storage.directory": directory,
        }
    )


def test_the_path_of_the_page_is_printed(
    draftloop: Callable[..., Result], directory: Path, options: list[str]
) -> None:
    before = (directory / "draftloop.sqlite").read_bytes()
    result = draftloop(*options, "report")
    assert result.exit_status == 0, result.err
    assert result.err == ""
    path = Path(result.out.removesuffix("\n"))
    assert path.parent == directory / "reports"
    assert path.name.startswith("report-20")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "The bare draft serves." in page
    assert f"{directory}, " in page
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert (directory / "draftloop.sqlite").read_bytes() == before


def test_output_names_the_file_and_a_second_report_replaces_it(
    draftloop: Callable[..., Result], options: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.html"
    path.write_text("an older one")
    result = draftloop(*options, "report", "--output", path)
    assert result.out == f"{path}\n"
    assert "<!doctype html>" in path.read_text(encoding="utf-8")


def test_a_second_report_of_the_day_has_its_own_name(
    draftloop: Callable[..., Result], tmp_path: Path
) -> None:
    write_store(tmp_path, sample_requests(20))
    words = [*settings(**{"storage.directory": tmp_path}), "report"]
    first, second, third = (Path(draftloop(*words).out.strip()) for _ in range(3))
    names = [one.name.removeprefix(first.stem) for one in (second, third)]
    assert names == ["-2.html", "-3.html"]
    assert first.exists()


def test_another_pair_is_told_which_pairs_there_are(draftloop: Callable[..., Result], tmp_path: Path) -> None:
    write_store(tmp_path, sample_requests(20))
    result = draftloop(*settings(**{"storage.directory": tmp_path, "models.draft.name": "./x"}), "report")
    assert result.exit_status == 0
    assert "No request of this pair is stored." in Path(result.out.strip()).read_text(encoding="utf-8")
    words = shlex.split(result.err.splitlines()[1].partition(": draftloop ")[2])
    shown = draftloop(*words)
    assert shown.err == ""
    assert "The bare draft serves." in Path(shown.out.strip()).read_text(encoding="utf-8")


def test_tokens_have_their_text_where_the_models_are_here(
    draftloop: Callable[..., Result],
    toy_pair: Callable[..., tuple[Path, Path]],
    options: list[str],
    tmp_path: Path,
) -> None:
    target, draft = toy_pair()
    pair = PairKey(str(target), str(draft))
    tokenizer = Tokenizer.load(target)
    swaps = ((tokenizer.encode(" t")[0], tokenizer.encode("<")[0]), (270, 271))
    write_store(tmp_path / "toys", [replace(one, pair=pair) for one in sample_requests(20, swaps=swaps)])
    toys = settings(
        **{
            "models.target.name": target,
            "models.draft.name": draft,
            "storage.directory": tmp_path / "toys",
        }
    )
    page = Path(draftloop(*toys, "report").out.strip()).read_text(encoding="utf-8")
    assert "␣t</code>" in page
    assert "&lt;</code>" in page
    assert "tokens by number" not in page
    without = Path(draftloop(*options, "report").out.strip()).read_text(encoding="utf-8")
    assert "tokens by number" in without
    assert ">token 262<" in without


def test_no_store_is_wrong_input_and_makes_nothing(draftloop: Callable[..., Result], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    draftloop(*settings(**{"storage.directory": missing}), "report").assert_wrong_input(
        str(missing), "generate"
    )
    assert not missing.exists()


def test_an_empty_store_makes_a_page(draftloop: Callable[..., Result], tmp_path: Path) -> None:
    open_store(tmp_path / "empty", max_megabytes=1).close()
    result = draftloop(*settings(**{"storage.directory": tmp_path / "empty"}), "report")
    assert result.exit_status == 0, result.err
    assert "No training run yet." in Path(result.out.strip()).read_text(encoding="utf-8")


def test_it_reads_while_another_process_writes(
    draftloop: Callable[..., Result], options: list[str], directory: Path
) -> None:
    with open_store(directory, max_megabytes=100) as writer, writer.transaction():
        result = draftloop(*options, "report")
    assert result.exit_status == 0, result.err


def test_a_damaged_store_fails_and_is_left_alone(draftloop: Callable[..., Result], tmp_path: Path) -> None:
    database = tmp_path / "draftloop.sqlite"
    database.write_bytes(b"no database at all" * 100)
    draftloop(*settings(**{"storage.directory": tmp_path}), "report").assert_fails(1, str(database))
    assert database.read_bytes() == b"no database at all" * 100
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "no folder"])
def test_output_must_name_a_plain_file(
    draftloop: Callable[..., Result], options: list[str], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "place" if kind != "no folder" else tmp_path / "no" / "place"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    draftloop(*options, "report", "--output", path).assert_wrong_input("--output", str(path))
    assert kind == "no folder" or (path.is_dir() if kind == "folder" else path.is_fifo())
