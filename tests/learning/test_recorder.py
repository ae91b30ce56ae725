"""What is stored of an answer, and what is not, through the engine and the store."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest

from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.engine import Completion, Engine, Request
from draftloop.errors import StorageError
from draftloop.learning.recorder import Provenance, Recorder, digest, domain_of, trace_rows
from draftloop.models.messages import Message
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.round import Round
from draftloop.speculation.stream import Pair
from draftloop.storage.records import PairKey
from draftloop.storage.store import open_store
from draftloop.types import Sampling, TokenKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from draftloop.storage.records import RequestRecord
    from draftloop.storage.store import Store

PAIR = PairKey("a target", "a draft")
SAMPLED = Sampling(temperature=0.8, top_p=0.95, top_k=40, min_p=0.01)
KINDS = list(TokenKind)


@pytest.fixture(scope="module")
def models(toy_pair: Callable[..., tuple[Path, Path]]) -> tuple[NumpyBackend, Pair, Tokenizer]:
    folders, backend = toy_pair(noise=0.05), NumpyBackend()
    target, draft = (backend.load(folder, max_kv_cache_tokens=200) for folder in folders)
    return backend, Pair(target, draft), Tokenizer.load(folders[0])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store", max_megabytes=10) as opened:
        yield opened


@pytest.fixture
def engine(models: tuple[NumpyBackend, Pair, Tokenizer], store: Store) -> Engine:
    backend, pair, tokenizer = models
    return Engine(backend, pair, tokenizer, cache_clear_frequency=10, recorder=Recorder(store, PAIR, 20))


def request(engine: Engine, provenance: Provenance | None, **options: object) -> Request:
    values: dict[str, object] = {"sampling": SAMPLED, "max_tokens": 24, "num_draft_tokens": 3, "seed": 5}
    tokens = engine.tokenizer.chat_tokens([Message("user", "Hello there")])
    return Request(tokens, **{**values, "provenance": provenance, **options})  # type: ignore[arg-type]


def stored(store: Store) -> list[RequestRecord]:
    return store.requests.load([one.id for one in store.requests.list(PAIR)])


def test_an_answer_is_stored_as_it_was_made(engine: Engine, store: Store) -> None:
    asked = request(engine, Provenance("jokes", "collect", key="k1"), min_tokens=4)
    completion = engine.complete(asked)
    (record,) = stored(store)
    assert (record.pair, record.adapter, record.domain, record.source, record.key) == (
        PAIR, None, "jokes", "collect", "k1",
    )  # fmt: skip
    assert record.prompt_tokens.tolist() == list(asked.prompt_tokens)
    assert tuple(record.answer_tokens.tolist()) == completion.token_ids
    assert (record.sampling, record.min_tokens, record.num_draft_tokens) == (SAMPLED, 4, 3)
    assert (record.seed, record.finish_reason) == (5, completion.finish_reason.value)
    assert (record.prompt_s, record.decode_s) == (completion.prompt_s, completion.decode_s)
    tally = completion.tally
    assert (record.rounds, record.drafted_tokens, record.accepted_tokens, record.tested_tokens) == (
        tally.rounds, tally.drafted_tokens, tally.accepted_tokens, tally.tested_tokens,
    )  # fmt: skip
    assert record.alpha_sum == pytest.approx(tally.alpha_sum)


def test_the_trace_has_a_row_for_each_token(engine: Engine, store: Store) -> None:
    completion = engine.complete(request(engine, Provenance("jokes", "collect"), trace=True))
    (record,) = stored(store)
    rows, count = record.traces, len(completion.token_ids)
    assert len(rows.round_index) == len(rows.kinds) == len(rows.draft_ids) == len(rows.top_ids) == count
    assert rows.round_index[-1] == completion.tally.rounds - 1
    assert sorted(set(rows.round_index.tolist())) == list(range(completion.tally.rounds))
    accepted = rows.kinds == KINDS.index(TokenKind.ACCEPTED)
    assert int(accepted.sum()) == completion.tally.accepted_tokens
    assert rows.draft_ids[accepted].tolist() == record.answer_tokens[accepted].tolist()
    assert (rows.draft_ids[rows.kinds == KINDS.index(TokenKind.BONUS)] == -1).all()
    expected = np.concatenate([trace.top_ids for trace in completion.traces])
    assert (rows.top_ids == expected).all()
    mass = np.exp(rows.top_logprobs.astype(np.float64)).sum(axis=1) + rows.tail_mass
    assert mass == pytest.approx(np.ones(count), abs=5e-3)  # log-probabilities are stored in 16 bits


def test_the_target_alone_is_stored_too(engine: Engine, store: Store) -> None:
    engine.complete(request(engine, Provenance("jokes", "generate"), num_draft_tokens=0))
    (record,) = stored(store)
    assert (record.drafted_tokens, record.tested_tokens, record.num_draft_tokens) == (0, 0, 0)
    assert (record.traces.kinds == KINDS.index(TokenKind.TARGET)).all()
    assert (record.traces.draft_ids == -1).all()


def test_what_a_stop_string_cut_off_is_not_stored(engine: Engine, store: Store) -> None:
    whole = engine.complete(request(engine, None))
    stop = whole.text[6:8]
    cut = engine.complete(request(engine, Provenance("jokes", "generate"), stop=(stop,)))
    (record,) = stored(store)
    assert tuple(record.answer_tokens.tolist()) == cut.token_ids
    assert len(cut.token_ids) < len(whole.token_ids)
    assert len(record.traces.kinds) == len(cut.token_ids)


def test_nothing_is_stored_without_a_provenance(engine: Engine, store: Store) -> None:
    engine.complete(request(engine, None))
    assert store.requests.count() == 0


def test_a_broken_off_answer_is_stored_and_its_prompt_is_not_collected(engine: Engine, store: Store) -> None:
    events = engine.stream(request(engine, Provenance("jokes", "collect", key="k1"), min_tokens=20))
    pieces = [next(events) for _ in range(6)]
    events.close()  # type: ignore[attr-defined]
    assert not any(isinstance(piece, Completion) for piece in pieces)
    (record,) = stored(store)
    assert record.finish_reason == "cancelled"
    assert len(record.answer_tokens) == len(record.traces.kinds) > 0
    assert record.key is None
    assert store.requests.collected_keys(PAIR) == set()


def test_turns_of_one_conversation_are_on_one_side(engine: Engine, store: Store) -> None:
    for seed, conversation in ((1, "c1"), (2, "c1"), (3, None)):
        engine.complete(
            request(engine, Provenance("jokes", "chat", conversation=conversation), seed=seed, max_tokens=4)
        )
    first, second, alone = stored(store)
    assert first.split_key == second.split_key == "c1"
    engine.complete(request(engine, Provenance("jokes", "generate"), seed=9, max_tokens=3))
    *_, again = stored(store)
    assert again.split_key == alone.split_key != "c1"


def test_a_store_that_fails_costs_the_record_and_not_the_answer(
    engine: Engine, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise StorageError("the disk is full", remedy="Free some.")

    monkeypatch.setattr(store.requests, "add", fail)
    with caplog.at_level(logging.WARNING, "draftloop"):
        completion = engine.complete(request(engine, Provenance("jokes", "generate")))
    assert completion.token_ids
    assert "not stored: the disk is full" in caplog.text
    assert store.requests.count() == 0


def test_a_round_without_its_trace_is_a_mistake() -> None:
    bare = Round((1,), (TokenKind.TARGET,), 0, 0, (), None, trace=None)
    with pytest.raises(ValueError, match="1 of 1 rounds"):
        trace_rows([bare])


def test_a_domain_is_the_tag_or_the_system_message() -> None:
    assert domain_of("be brief", "poems") == "poems"
    assert domain_of("be brief") == f"system {digest('be brief')[:8]}" != domain_of("be long")
    assert domain_of("") == domain_of("", None) == "no system message"
