"""The server does what its OpenAPI document says, whatever it is sent."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import schemathesis
from asking import ask
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import toy_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def address(toy_pair: Callable[..., tuple[Path, Path]]) -> Iterator[str]:
    with toy_server(toy_pair(noise=0.05), generation={"max_tokens": 4}) as address:
        yield address


VALID, BROKEN = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("method", "path", "mode", "examples"),
    [
        ("POST", "/v1/chat/completions", VALID, 60),
        ("POST", "/v1/chat/completions", BROKEN, 60),
        ("POST", "/v1/completions", VALID, 40),
        ("POST", "/v1/completions", BROKEN, 40),
        ("GET", "/v1/models/{model}", VALID, 10),
        ("GET", "/v1/models", VALID, 1),
    ],
)
def test_every_answer_is_documented(
    address: str, method: str, path: str, mode: GenerationMode, examples: int
) -> None:
    operation = schemathesis.openapi.from_url(f"{address}/openapi.json")[path][method]
    statuses: Counter[int] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "draftloop"
        # What fields may be together, and which models there are, no schema can say.
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        statuses[response.status_code] += 1

    check()
    if method == "POST":
        assert statuses[200] > 0 if mode is VALID else statuses[400] > 0


def test_the_document_has_no_answer_that_is_never_given(address: str) -> None:
    document = ask(address, "/openapi.json").json
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert operations
    assert not any("422" in operation["responses"] for operation in operations)
    assert ask(address, "/docs").status == 404


def test_the_document_says_how_the_key_is_sent_where_there_is_one(address: str) -> None:
    document = ask(address, "/openapi.json").json
    (name,) = document["components"]["securitySchemes"]
    scheme = document["components"]["securitySchemes"][name]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert document["security"] == [{name: []}, {}]
