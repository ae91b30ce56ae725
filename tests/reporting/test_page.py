"""The page as a whole: complete, self-contained, escaped, small, and in words where there is nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from draftloop.reporting.overview import marks_of
from draftloop.reporting.page import Surroundings, render_report
from draftloop.reporting.stored import read_stored
from draftloop.reporting.tokens import TokenNames
from draftloop.storage.records import Activation, AdapterStatus, PairKey, RunPoint, RunRecord, RunStatus
from draftloop.storage.store import open_store
from reporting import sample
from reporting.sample import PAIR, sample_stored

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.reporting.stored import Stored

SURROUNDINGS = Surroundings(1.76e9, [("This machine", "a <fast> one")], "Training waits: 12 of 50 failures.")
VOID = {"meta", "link", "br", "path"}
HOSTILE = "</p><script>alert(1)</script>{{ 7 * 7 }}\u202e"


class Outline(HTMLParser):
    """Every element in its place; text by heading."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID or (tag == "path" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def outline(stored: Stored) -> Outline:
    return Outline(render_report(stored, TokenNames(None), SURROUNDINGS))


@pytest.fixture(scope="module")
def full(filled_directory: Path) -> Stored:
    with open_store(filled_directory, max_megabytes=1000, read_only=True) as store:
        return read_stored(store, PAIR)


def run_of(result: dict[str, Any], points: list[RunPoint] | None = None) -> dict[str, Any]:
    """Fields of `Stored` for one run."""
    run = RunRecord(1, PAIR, None, 1.0, 9.0, RunStatus.REJECTED, {}, result)
    return {"runs": [run], "num_runs": 1, "points": {1: points or []}}


def test_every_part_of_a_full_store_is_on_the_page(full: Stored) -> None:
    words = outline(full).words
    for part in (
        "Over requests",
        "Domains",
        "Held-out prompts",
        "Adapters",
        "Training",
        "The hardest tokens",
    ):
        assert part in words
    assert "Adapter a0001 serves." in words
    assert "1 rejected, 1 taken back" in words
    for name in ("▲ a0001", "▲ a0003", "↩ a0001", "ship's log", "system 9f86d081", sample.REVERT_REASON):
        assert name in words
    assert "2 steps skipped" in words
    assert "a <fast> one" in words
    assert "Run 3 was judged on 54 requests" in words
    assert "+8.5 % (+6.6 % to +10.6 %)" in words
    assert "Tau with a0003 over tau with a0001" in words
    assert "tau with a0001 · above the diagonal is a gain" in words


def test_the_page_fetches_nothing(full: Stored) -> None:
    page = render_report(full, TokenNames(None), SURROUNDINGS)
    seen = outline(full)
    for tag, name, value in seen.attributes:
        assert tag != "script"
        assert name not in ("src", "srcset", "xlink:href", "action")
        assert name != "href" or value == "data:,"
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page
    assert all(character < "\ud800" or character > "\udfff" for character in page)


def test_a_page_of_many_requests_is_small(full: Stored) -> None:
    many = replace(
        full,
        requests=[replace(one, id=one.id + 1000 * turn) for turn in range(50) for one in full.requests],
    )
    many = replace(many, drafted=[one for one in many.requests if one.drafted_tokens])
    assert len(many.requests) == 20_000
    assert len(render_report(many, TokenNames(None), SURROUNDINGS).encode()) < 300_000


def test_whatever_is_stored_is_escaped(full: Stored) -> None:
    hostile = replace(
        full,
        pair=PairKey(HOSTILE, HOSTILE),
        requests=[replace(one, domain=HOSTILE, source=HOSTILE) for one in full.requests],
        adapters=[replace(one, reason=HOSTILE, form=HOSTILE) for one in full.adapters],
        history=[replace(one, reason=HOSTILE) for one in full.history],
        runs=[
            replace(
                one,
                recipe={HOSTILE: HOSTILE},
                result={
                    "reason": HOSTILE,
                    "held_out": [
                        {"domain": HOSTILE, "tau_before": 1.0, "tau_after": 2.0, "request": HOSTILE}
                    ],
                    "domains": {HOSTILE: {}},
                },
            )
            for one in full.runs
        ],
    )
    seen = outline(hostile)
    assert not [tag for tag, _, _ in seen.attributes if tag == "script"]
    assert "<script>alert(1)</script>" in seen.words
    assert "{{ 7 * 7 }}" in seen.words


def test_an_empty_store_is_told_in_words() -> None:
    empty = replace(sample_stored(0), other_pairs={PairKey("big", "small"): 7})
    words = outline(empty).words
    for said in (
        "No request has been answered with the draft yet",
        "The store has others: big with small (7 requests).",
        "No adapter has been judged yet.",
        "No adapter yet",
        "No training run yet.",
        "12 of 50 failures",
        "No proposal has been tested yet.",
    ):
        assert said in words


def test_requests_without_drafts_are_told_in_words() -> None:
    words = outline(sample_stored(12)).words
    assert "12 requests stored, but none of them with drafts." in words


@pytest.mark.parametrize("count", [13, 14, 17, 40])
def test_few_requests_make_a_page(count: int) -> None:
    words = outline(sample_stored(count)).words
    assert "The bare draft serves." in words
    assert f"newest {count - 12} request" in words
    assert "No adapter has been promoted yet." in words


def test_an_adapter_without_requests_says_so(full: Stored) -> None:
    fresh = replace(full, active="a0002")
    said = "Adapter a0002 serves; no stored request has been answered with it. On held-out prompts the gate "
    assert f"{said}measured tau 3.11 → 3.12." in outline(fresh).words
    unjudged = replace(fresh, adapters=[])
    assert "has been answered with it. Target" in outline(unjudged).words


def test_a_run_that_broke_off_has_no_curve_and_no_verdict() -> None:
    words = outline(replace(sample_stored(20), **run_of({}))).words
    assert "No step was recorded." in words
    assert "No adapter has been judged yet." in words


@pytest.mark.parametrize(
    "result",
    [
        {"held_out": None, "domains": []},
        {"held_out": [1, {}, {"domain": "x", "tau_before": None, "tau_after": 1.0}], "domains": {"x": 1}},
        {"held_out": [{"domain": "x", "tau_before": 2.0, "tau_after": 2.0}], "domains": {"x": {"rows": "?"}}},
        {"held_out": [{"domain": "x", "tau_before": 2.0, "tau_after": 3.0}]},
    ],
)
def test_a_result_of_another_shape_is_shown_as_far_as_it_goes(result: dict[str, Any]) -> None:
    points = [RunPoint(1, 0.1, None, 1e-4, None, None), RunPoint(1, 0.1, None, None, None, 0.5)]
    stored = replace(sample_stored(20), **run_of(result, points))
    assert "1 step skipped" in outline(stored).words


def test_adapters_of_any_kind_are_listed(full: Stored) -> None:
    first = full.adapters[0]
    adapters = [
        replace(first, name="a0007", run=None, metrics={}),
        replace(first, name="a0008", metrics={"gain": 0.5, "gain_ci95": [None, "x"]}),
        replace(first, name="a0009", metrics={"gain": float("nan"), "gain_ci95": None, "tau_after": 3.0}),
    ]
    words = outline(replace(full, adapters=adapters, active=None)).words
    assert "brought in from outside" in words
    assert "+50.0 %" in words
    assert "– → 3.00" in words  # noqa: RUF001
    assert "None of its adapters is active" in words
    assert "nan" not in words


def test_a_recipe_is_listed_without_its_long_lists(full: Stored) -> None:
    recipe = {
        "settings": {"lora": {"rank": 8, "target_modules": ["q_proj", "v_proj"]}},
        "gate": [3, 9, 27],
        "gate_domains": ["a domain of many"] * 40,
        "parent": None,
        "replay": [],
        "checkpointing": True,
        "vocabulary": "AbC" * 1000,
    }
    runs = [replace(full.runs[0], recipe=recipe), *full.runs[1:]]
    words = outline(replace(full, runs=runs)).words
    for said in (
        "settings.lora.rank 8",
        "q_proj, v_proj",
        "3 requests, 3 to 27",
        "40 values",
        "parent none",
        "replay none",
        "checkpointing true",
        "vocabulary 3,000 characters",
    ):
        assert said in words
    assert "a domain of many" not in words


def test_marks_tell_a_step_on_from_a_step_back(full: Stored) -> None:
    adapters = [
        replace(full.adapters[0], name="a0001", parent=None, status=AdapterStatus.PROMOTED),
        replace(full.adapters[0], name="a0002", parent="a0001", status=AdapterStatus.PROMOTED),
    ]
    names = ["a0001", "a0002", "a0001", None, "a0002"]
    history = [Activation(i, PAIR, name, 1.76e9, "why", 20 * i) for i, name in enumerate(names)]
    marks = marks_of(full.drafted, adapters, history)
    assert [mark.label for mark in marks] == ["▲ a0001", "▲ a0002", "↩ a0001", "↩ bare", "▲ a0002"]
    assert [mark.kind for mark in marks] == ["on", "on", "back", "back", "on"]
    assert all("why" in mark.title for mark in marks)
    # The first 12 requests had no drafts, so request 20 is the eighth one on the axis.
    assert [mark.x for mark in marks] == [0.5, 8.5, 28.5, 48.5, 68.5]


def test_adapters_that_are_each_others_parents_do_not_hang_the_report(full: Stored) -> None:
    first = full.adapters[0]
    adapters = [replace(first, name="a0001", parent="a0002"), replace(first, name="a0002", parent="a0001")]
    history = [Activation(i, PAIR, name, 1.0, "", 0) for i, name in enumerate(["a0001", "a0003", None])]
    kinds = [mark.kind for mark in marks_of(full.drafted, adapters, history)]
    assert kinds == ["on", "on", "back"]
