"""The dashboard in a browser: what is seen, read by keyboard, clicked, and never run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from browser import DEADLINE_MS, chromium, served
from classroom_service import add_adapter, serve_classroom, taught_service

from draftloop.answers import Request
from draftloop.learning.recorder import Provenance
from draftloop.models.tokenizer import Message
from draftloop.server.app import create_app
from draftloop.server.learning import LearningState, Phase, Progress
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi import FastAPI
    from playwright.sync_api import Browser, Page

    from draftloop.server.learning import Learner
    from draftloop.server.service import Service
    from pupils import Classroom

SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
KEY = "the-servers-key"
FROM_BEFORE = "These are from before: this server stores no new ones."
FIRST_TEXTS = "nodes => nodes.map(node => node.firstChild.data)"
BACKGROUND = "node => getComputedStyle(node).backgroundColor"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def service(classroom: Classroom) -> Iterator[Service]:
    with taught_service(classroom) as service:
        yield service


@pytest.fixture
def app(service: Service) -> FastAPI:
    return create_app(service)


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complained of."""
    return []


@pytest.fixture
def visit(browser: Browser, complaints: list[str]) -> Iterator[Callable[..., Page]]:
    """`visit(address, **options)`: the page there."""
    contexts = []

    def open_page(address: str, **options: object) -> Page:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(DEADLINE_MS)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


def record(service: Service, classroom: Classroom, text: str) -> None:
    """Answer one message and store it, without a server."""
    engine = classroom.engine(service.store)
    tokens = engine.tokenizer.chat_tokens([Message("user", text)])
    provenance = Provenance("asked", "serve")
    engine.complete(
        Request(tokens, Sampling(), 40, num_draft_tokens=3, min_tokens=40, provenance=provenance),
    )


def active(service: Service, classroom: Classroom) -> str | None:
    assert service.store is not None
    found = service.store.adapters.active(classroom.pair)
    return found and found.name


def test_it_shows_figures_charts_and_coloured_tokens_with_p_and_q(
    app: FastAPI, service: Service, classroom: Classroom, visit: Callable[..., Page], complaints: list[str]
) -> None:
    record(service, classroom, "Hello")
    with served(app) as address:
        page = visit(address)
        page.locator("#reading .token").first.wait_for()
        assert page.locator("#headline").inner_text() == "Adapter a0001 drafts"
        assert page.locator(".chart svg .line").count() == 2 * 3
        assert page.locator(".mark-label").evaluate_all(FIRST_TEXTS) == ["▲ a0001"] * 3
        assert page.locator("#list button").count() == 20
        kinds = {
            kind: page.locator(f"#reading .words .{kind}").first.evaluate(BACKGROUND)
            for kind in ("accepted", "recovered")
        }
        assert len(set(kinds.values()) | {"rgba(0, 0, 0, 0)"}) == 3
        page.locator("#reading .words .accepted").first.hover()
        assert page.locator("#tip").inner_text().split("\n")[-1].startswith("p ")
        assert " · q " in page.locator("#tip").inner_text()
        page.locator("#reading .words .recovered").first.hover()
        assert "the draft proposed" in page.locator("#tip").inner_text()
        assert "its q " in page.locator("#tip").inner_text()
        page.locator(".place").first.hover()
        assert "request " in page.locator(".readout").first.inner_text()
        page.set_viewport_size({"width": 390, "height": 800})
        page.wait_for_selector(".place svg[width='358']")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert complaints == []


def test_everything_is_reached_by_keyboard(
    app: FastAPI, visit: Callable[..., Page], complaints: list[str]
) -> None:
    with served(app) as address:
        page = visit(address)
        page.locator("#reading .token").first.wait_for()
        page.locator(".place").first.focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator(".readout").first.inner_text().startswith("request 50:")
        page.keyboard.press("ArrowLeft")
        assert page.locator(".readout").first.inner_text().startswith("request 49:")
        tokens = page.locator("#reading .words .token")
        assert [tokens.nth(i).get_attribute("tabindex") for i in range(tokens.count())].count("0") == 1
        tokens.first.focus()
        first = page.locator("#tip").inner_text()
        page.keyboard.press("ArrowRight")
        assert page.locator("#tip").is_visible()
        assert tokens.nth(1).evaluate("node => node === document.activeElement")
        page.keyboard.press("End")
        assert page.locator("#tip").inner_text() != first
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.locator("#list button").nth(1).focus()
        page.keyboard.press("Enter")
        page.get_by_text("request 49 ·").wait_for()
    assert complaints == []


def axes(page: Page) -> list[tuple[str, str]]:
    """The lowest and the highest label of each chart's upright axis."""
    labels = [chart.locator("svg .tick[text-anchor=end]") for chart in page.locator(".chart").all()]
    return [(one.first.inner_html(), one.last.inner_html()) for one in labels]


def test_of_a_single_request_too_the_axes_hold_what_can_be(
    classroom: Classroom, visit: Callable[..., Page], complaints: list[str]
) -> None:
    service = serve_classroom(classroom, storage__directory=str(classroom.folder / "single"))
    record(service, classroom, "Hello")
    with served(create_app(service)) as address:
        page = visit(address)
        page.locator("#reading .token").first.wait_for()
        speed, alpha, tau = axes(page)
        assert float(speed[0]) == 0
        assert alpha == ("0.0", "1.0")
        assert float(tau[0]) == 1
        assert float(tau[1]) >= 1.5
        caption = page.locator(".chart figcaption").last.inner_text()
        assert caption == "Tau, tokens a round, without suffix matches"
    assert complaints == []


def test_text_of_users_is_shown_and_never_run(
    app: FastAPI, service: Service, classroom: Classroom, visit: Callable[..., Page], complaints: list[str]
) -> None:
    record(service, classroom, SCRIPT)
    assert service.store is not None
    service.store.adapters.set_status("a0002", service.store.adapters.list(classroom.pair)[1].status, SCRIPT)
    with served(app) as address:
        page = visit(address)
        page.locator("#reading .token").first.wait_for()
        assert page.locator("#reading .turn .words").nth(-2).inner_text() == SCRIPT
        assert SCRIPT in page.locator("#list button").first.inner_text()
        page.locator("#adapters").get_by_text(SCRIPT).wait_for()
        assert page.locator("main script, main img").count() == 0
        assert page.evaluate("window.hacked") is None
    assert complaints == []


def test_promoting_asks_does_it_and_says_what_the_server_says(
    app: FastAPI, service: Service, classroom: Classroom, visit: Callable[..., Page], complaints: list[str]
) -> None:
    with served(app) as address:
        page = visit(address)
        page.get_by_role("button", name="Promote a0002").click()
        page.get_by_role("button", name="Cancel").click()
        assert active(service, classroom) == "a0001"
        page.get_by_role("button", name="Promote a0002").click()
        page.get_by_role("button", name="Promote", exact=True).click()
        page.get_by_text("a0002 is active from the next request on.").wait_for()
        assert active(service, classroom) == "a0002"
        page.get_by_role("heading", name="a0002 active").wait_for()
        page.get_by_role("heading", name="Adapter a0002 drafts").wait_for()
        page.get_by_role("button", name="Revert a0002").click()
        page.get_by_role("button", name="Revert", exact=True).click()
        page.get_by_text("the bare draft is active from the next request on.").wait_for()
        assert active(service, classroom) is None
        page.locator("#revert").wait_for(state="hidden")
    assert complaints == []


def test_an_answer_appears_by_itself(
    app: FastAPI, service: Service, classroom: Classroom, visit: Callable[..., Page], complaints: list[str]
) -> None:
    with served(app) as address:
        page = visit(address)
        page.locator("#list button").first.wait_for()
        record(service, classroom, "A new question")
        page.locator("#list button", has_text="A new question").wait_for()
        assert page.locator("#list button").first.get_attribute("data-id") == "51"
        # What is being read stays.
        assert "request 50" in page.locator("#reading").inner_text()
    assert complaints == []


def test_without_requests_it_says_what_to_do(
    classroom: Classroom, visit: Callable[..., Page], complaints: list[str]
) -> None:
    service = serve_classroom(classroom, storage__directory=str(classroom.folder / "empty"))
    with served(create_app(service)) as address:
        page = visit(address)
        page.get_by_text("No adapter yet").wait_for()
        assert page.locator("#over-note").inner_text().startswith("No requests yet:")
        assert f"{address}/v1" in page.locator("#over-note").inner_text()
        assert page.locator("#said-note").inner_text() == "No answer to read yet."
        assert page.locator("#headline").inner_text() == "The bare draft drafts"
    assert complaints == []


def test_training_and_what_is_not_stored_are_told(
    classroom: Classroom, visit: Callable[..., Page], complaints: list[str]
) -> None:
    progress = Progress(run=3, step=5, steps=20, epoch=0.5, validation_alpha=0.8, eta_s=240)
    state = LearningState(
        Phase.TRAINING, progress=progress, last_outcome={"status": "rejected", "reason": "Why."}
    )
    states = [state]
    learner = SimpleNamespace(state=lambda: states[-1], start=lambda _: None, stop=lambda: True)
    service = serve_classroom(classroom, storage__collect="false")
    app = create_app(replace(service, learner=cast("Learner", learner)))
    with served(app) as address:
        page = visit(address)
        page.get_by_text("step 5 of 20 · about 4 min left · validation alpha 0.800").wait_for()
        assert page.get_by_role("progressbar").get_attribute("value") == "5"
        page.get_by_text("Last run of this server: rejected. Why.").wait_for()
        page.get_by_text("This server stores nothing").first.wait_for()
        page.locator("#list button").first.wait_for()
        assert page.locator("#said-note").inner_text() == FROM_BEFORE
        page.get_by_role("button", name="Older").click()
        page.get_by_role("button", name="Newer").wait_for()
        assert page.locator("#said-note").inner_text() == FROM_BEFORE
        page.get_by_text("failures are there").wait_for()
        failed = {"status": "failed", "reason": "Why."}
        states.append(LearningState(Phase.OFF, why_off="it failed", last_outcome=failed))
        page.get_by_text("Learning is off: it failed.").wait_for()
        assert page.get_by_text("failures are there").is_hidden()
        page.get_by_text("Last run of this server: failed. Why.").wait_for()
    assert complaints == []


def test_a_key_is_asked_for_and_kept_in_the_tab(classroom: Classroom, visit: Callable[..., Page]) -> None:
    add_adapter(classroom, "a0002")
    service = serve_classroom(classroom, server__api_key=KEY)
    with served(create_app(service)) as address:
        page = visit(address)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_text("That key is not the server's.").wait_for()
        assert page.locator("main").is_hidden()
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#reading .token").first.wait_for()
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.get_by_role("button", name="Promote a0002").click()
        page.get_by_role("button", name="Promote", exact=True).click()
        page.get_by_text("a0002 is active from the next request on.").wait_for()
        page.reload()
        page.locator("#reading .token").first.wait_for()
