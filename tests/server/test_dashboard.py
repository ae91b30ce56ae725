"""The dashboard's addresses: what they tell, what they change, and for whom."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from classroom_service import Asker, add_adapter, serve_classroom, taught_service
from starlette.testclient import TestClient

from draftloop.answers import Completion
from draftloop.reporting.figures import alpha_of, tau_of, tokens_per_s_of
from draftloop.server.app import create_app
from draftloop.server.dashboard import content
from draftloop.server.dashboard.session import MAX_REQUESTS, SessionHistory
from draftloop.server.learning import LearningState, Phase, Progress
from draftloop.speculation.metrics import Tally
from draftloop.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.server.learning import Learner
    from draftloop.server.service import Service
    from pupils import Classroom

ADDRESS = "http://127.0.0.1:8080"
JSON = {"Content-Type": "application/json"}
COMPLETION = Completion(
    "text", (1, 2), FinishReason.STOP, 4, 0, Tally(rounds=1, drafted_tokens=1), 0.1, 0.2, 7
)


@pytest.fixture
def service(classroom: Classroom) -> Iterator[Service]:
    with taught_service(classroom) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url=ADDRESS) as client:
        yield client


def active(service: Service, classroom: Classroom) -> str | None:
    assert service.store is not None
    found = service.store.adapters.active(classroom.pair)
    return found and found.name


def told(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


class TestPage:
    def test_it_loads_nothing_from_elsewhere(self, client: TestClient) -> None:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        loaded = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert {"/dashboard/report.css", "/dashboard/dashboard.css", "/dashboard/dashboard.js"} <= set(loaded)
        while loaded:
            address = loaded.pop()
            assert address.startswith("/dashboard/")
            asset = client.get(address)
            assert asset.status_code == 200, address
            assert "http" not in asset.text.replace("http://www.w3.org/2000/svg", "")
            loaded += [f"/dashboard/{name}" for name in re.findall(r'from "\./([^"]+)"', asset.text)]

    def test_every_answer_says_what_a_browser_may_do_with_it(self, client: TestClient) -> None:
        for address in ("/", "/dashboard/dashboard.js", "/dashboard/none.js", "/api/state"):
            headers = client.get(address).headers
            assert headers["content-security-policy"].startswith("default-src 'self';")
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("name", ["none.js", "index.html", "%2e%2e%2froutes.py", "..%5croutes.py", "%00"])
    def test_nothing_but_its_files_is_given_away(self, client: TestClient, name: str) -> None:
        assert client.get(f"/dashboard/{name}").status_code == 404

    def test_the_apis_document_does_not_promise_the_pages_own_addresses(self, client: TestClient) -> None:
        paths = client.get("/openapi.json").json()["paths"]
        assert "/health" in paths
        assert not [path for path in paths if path == "/" or path.startswith(("/api", "/dash"))]


class TestFigures:
    def test_state_changes_with_an_answer(self, service: Service, client: TestClient) -> None:
        before = told(client.get("/api/state"))
        assert (before["status"], before["storing"], before["worn"]) == ("ready", True, "a0001")
        assert before["tokens_per_s"] is before["alpha"] is before["tau"] is None
        assert client.portal is not None
        completion = client.portal.call(Asker(service), "Hello")
        after = told(client.get("/api/state"))
        assert after["answered"] != before["answered"]
        assert after["learnt"] == before["learnt"]
        assert (after["requests"], after["tokens"]) == (1, 12)
        assert after["tau"] == completion.tally.tau
        assert after["alpha"] == completion.tally.alpha
        assert sum(after["drafted_per_round"].values()) == completion.tally.rounds

    def test_history_is_the_stores_and_marks_the_promotion(
        self, service: Service, client: TestClient, classroom: Classroom
    ) -> None:
        assert client.portal is not None
        client.portal.call(Asker(service), "Hello")
        history = told(client.get("/api/history"))
        assert service.store is not None
        stored = service.store.requests.list(classroom.pair)
        assert history["requests"] == len(history["points"]) == len(stored) == 51
        for point, summary in zip(history["points"], stored, strict=True):
            metrics = [point[key] for key in ("id", "alpha", "tau", "tokens_per_s")]
            assert metrics == [summary.id, alpha_of(summary), tau_of(summary), tokens_per_s_of(summary)]
        marks = [(mark["kind"], mark["label"], mark["x"]) for mark in history["marks"]]
        assert marks == [("on", "▲ a0001", 50.5)]
        assert [line[-1][0] for line in history["rolling"]["tau"]] == [50, 51]

    def test_training_says_what_it_waits_for(self, client: TestClient) -> None:
        training = told(client.get("/api/training"))
        assert "failures" in training["waiting"]
        assert training["runs"] == []


class TestConversations:
    def test_they_come_newest_first_page_by_page(self, client: TestClient) -> None:
        seen: list[int] = []
        before, more = "", True
        while more:
            page = told(client.get(f"/api/conversations{before}"))
            seen += [one["id"] for one in page["conversations"]]
            assert len(seen) <= 50
            before, more = f"?before={seen[-1]}", page["more"]
        assert seen == list(range(50, 0, -1))

    def test_one_is_its_turns_and_tokens(self, service: Service, client: TestClient) -> None:
        text = "<script>alert(1)</script>"
        assert client.portal is not None
        completion = client.portal.call(Asker(service), text)
        newest = told(client.get("/api/conversations"))["conversations"][0]
        assert (newest["prompt"], newest["domain"]) == (text, "asked")
        one = told(client.get(f"/api/conversations/{newest['id']}"))
        assert one["turns"][-1] == {"role": "user", "text": text}
        assert "".join(token["text"] for token in one["tokens"]) == completion.text
        assert tuple(token["id"] for token in one["tokens"]) == completion.token_ids
        kinds = [token["kind"] for token in one["tokens"]]
        assert kinds.count("accepted") == completion.tally.accepted_tokens
        # Greedy: the target's likeliest token is what was written.
        assert all(token["p"] and token["p"] >= (token["p_drafted"] or 0) for token in one["tokens"])

    @pytest.mark.parametrize("identity", ["51", "0", "-1", "9" * 30, "-" + "9" * 30])
    def test_one_that_is_not_stored_is_not_found(self, client: TestClient, identity: str) -> None:
        answer = client.get(f"/api/conversations/{identity}")
        assert answer.status_code == 404
        assert "not stored any more" in answer.json()["error"]["message"]

    def test_beyond_the_oldest_there_is_nothing(self, client: TestClient) -> None:
        assert told(client.get("/api/conversations?before=1")) == {"conversations": [], "more": False}

    def test_what_is_no_number_is_refused_by_name(self, client: TestClient) -> None:
        for path, param in (("?before=x", "before"), ("?before=0", "before"), ("/x", "identity")):
            answer = client.get(f"/api/conversations{path}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    def test_before_a_number_that_no_request_has_are_all(self, client: TestClient) -> None:
        page = told(client.get(f"/api/conversations?before={'9' * 30}"))
        assert page["conversations"][0]["id"] == 50


class TestAdapters:
    def test_they_are_listed_in_the_reports_words(self, client: TestClient) -> None:
        listed = told(client.get("/api/adapters"))
        assert listed["active"] == "a0001"
        words = {one["name"]: one["word"] for one in listed["adapters"]}
        assert words == {"a0001": "active", "a0002": "rejected"}
        assert listed["adapters"][0]["gain"] == "+8.8 % (+5.1 % to +12.0 %)"

    def test_a_promoted_one_is_worn_and_a_reverted_one_taken_off(
        self, service: Service, client: TestClient, classroom: Classroom
    ) -> None:
        assert client.portal is not None
        before = told(client.get("/api/state"))["learnt"]
        message = told(client.post("/api/adapters/a0002/promote", headers=JSON, content="{}"))["message"]
        assert told(client.get("/api/state"))["learnt"] != before
        assert message == "a0002 is active from the next request on. It was rejected before: a0002 was judged"
        assert active(service, classroom) == client.portal.call(Asker(service).worn) == "a0002"
        message = told(client.post("/api/revert", headers=JSON, content="{}"))["message"]
        assert message == "a0002 is taken back; the bare draft is active from the next request on."
        assert active(service, classroom) is client.portal.call(Asker(service).worn) is None
        answer = client.post("/api/revert", headers=JSON, content="{}")
        assert answer.status_code == 400
        assert "none to revert" in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("name", "words"),
        [("a0001", "active already"), ("a0009", "there is no adapter"), ("a0002", "model.safetensors")],
    )
    def test_what_the_command_refuses_is_refused(
        self, service: Service, client: TestClient, classroom: Classroom, name: str, words: str
    ) -> None:
        for file in (classroom.data / "adapters" / "a0002").glob("*.safetensors"):
            file.write_bytes(b"damaged")
        answer = client.post(f"/api/adapters/{name}/promote", headers=JSON, content="{}")
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert active(service, classroom) == "a0001"


class TestStrangers:
    @pytest.mark.parametrize(
        ("status", "headers"),
        [
            (415, {"Content-Type": "text/plain"}),
            (415, {"Content-Type": "application/x-www-form-urlencoded"}),
            (415, {"Content-Type": "application/jsonp"}),
            (403, {**JSON, "Origin": "http://evil.example"}),
            (403, {**JSON, "Origin": "http://127.0.0.1:9999"}),
            (403, {**JSON, "Origin": "null"}),
            (403, {**JSON, "Sec-Fetch-Site": "cross-site"}),
            (403, {**JSON, "Sec-Fetch-Site": "same-site"}),
        ],
    )
    def test_they_change_nothing(
        self, service: Service, client: TestClient, classroom: Classroom, status: int, headers: dict[str, str]
    ) -> None:
        for address in ("/api/adapters/a0002/promote", "/api/revert"):
            assert client.post(address, headers=headers, content="{}").status_code == status
        assert active(service, classroom) == "a0001"

    def test_a_page_that_may_use_the_api_reads_and_changes_nothing_here(self, classroom: Classroom) -> None:
        add_adapter(classroom, "a0001", promoted=True)
        service = serve_classroom(classroom, server__cors_origins="[http://front.example]")
        with TestClient(create_app(service), base_url=ADDRESS) as client:
            foreign = {**JSON, "Origin": "http://front.example"}
            assert client.post("/api/revert", headers=foreign, content="{}").status_code == 403
            assert client.get("/api/conversations", headers=foreign).status_code == 403
            assert client.get("/api/conversations").status_code == 200
        assert active(service, classroom) == "a0001"

    @pytest.mark.parametrize("address", ["/api/adapters/a0002/promote", "/api/revert"])
    def test_a_link_changes_nothing(self, client: TestClient, address: str) -> None:
        assert client.get(address).status_code == 405

    def test_the_page_itself_may(self, client: TestClient) -> None:
        own = {"Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}
        own |= {"Content-Type": "application/json; charset=utf-8"}
        assert client.post("/api/revert", headers=own, content="{}").status_code == 200


class TestNothingStored:
    @pytest.fixture
    def forgetful(self, classroom: Classroom) -> Iterator[Service]:
        add_adapter(classroom, "a0001")
        service = serve_classroom(classroom, storage__collect="false")
        yield service
        assert service.store is not None
        service.store.close()

    def test_figures_are_kept_until_the_server_stops_and_texts_are_not(self, forgetful: Service) -> None:
        with TestClient(create_app(forgetful), base_url=ADDRESS) as client:
            assert client.portal is not None
            first = told(client.get("/api/state"))
            assert first["storing"] is False
            completions = [client.portal.call(Asker(forgetful), text) for text in ("One", "Two")]
            assert told(client.get("/api/state"))["answered"] != first["answered"]
            history = told(client.get("/api/history"))
            assert [point["tau"] for point in history["points"]] == [
                one.tally.draft_tau for one in completions
            ]
            assert [point["alpha"] for point in history["points"]] == [one.tally.alpha for one in completions]
            assert [point["answer_tokens"] for point in history["points"]] == [12, 12]
            # Of what was stored before, there are texts; of these answers there are none.
            assert told(client.get("/api/conversations"))["conversations"][0]["id"] == 50

    def test_a_promotion_stands_between_the_requests_that_it_came_between(self, forgetful: Service) -> None:
        with TestClient(create_app(forgetful), base_url=ADDRESS) as client:
            assert client.portal is not None
            client.portal.call(Asker(forgetful), "One")
            told(client.post("/api/adapters/a0001/promote", headers=JSON, content="{}"))
            assert client.portal.call(Asker(forgetful).worn) == "a0001"
            client.portal.call(Asker(forgetful), "Two")
            history = told(client.get("/api/history"))
        assert [point["adapter"] for point in history["points"]] == [None, "a0001"]
        assert [(mark["label"], mark["x"]) for mark in history["marks"]] == [("▲ a0001", 1.5)]

    def test_the_newest_answers_are_kept(self) -> None:
        history = SessionHistory(clock=lambda: 5.0)
        for _ in range(MAX_REQUESTS + 3):
            history.add(COMPLETION)
        kept = history.requests()
        assert [kept[0].id, kept[-1].id, len(kept)] == [4, MAX_REQUESTS + 3, MAX_REQUESTS]
        assert history.count == MAX_REQUESTS + 3
        assert {one.created_s for one in kept} == {5.0}


class TestLearning:
    def test_progress_and_the_last_outcome_are_told(self, service: Service) -> None:
        progress = Progress(run=3, step=5, steps=20, epoch=0.5, validation_alpha=0.8, eta_s=12.5)
        outcome = {"status": "rejected", "reason": "It may be chance."}
        state = LearningState(Phase.TRAINING, progress=progress, last_outcome=outcome, promotions=1)
        learner = cast("Learner", SimpleNamespace(state=lambda: state))
        learning = content.state_of(replace(service, learner=learner))["learning"]
        assert learning["phase"] == "training"
        assert learning["enabled"] is True
        assert learning["progress"]["eta_s"] == 12.5
        assert learning["last_outcome"] == outcome
