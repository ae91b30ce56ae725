"""What one answer teaches the next ones through suffix matches, and what it must not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.benchmarking.contenders import Job, Ours
from draftloop.benchmarking.run import interleave
from draftloop.engine import Completion, Engine, PromptProgress, Request
from draftloop.learning.recorder import Provenance, Recorder
from draftloop.models.messages import Message
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.schedule import Schedule
from draftloop.speculation.stream import Pair
from draftloop.speculation.suffix import SuffixIndex, TokenTrail
from draftloop.storage.records import PairKey
from draftloop.storage.store import open_store
from draftloop.types import Sampling, TokenKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9)
FLAT = RoundCosts(((1, 1.0), (17, 1.1)), draft_s=0.9, draft_round_s=0.0, read_s=0.0)
"""Rows are nearly free and drafting is dear: whatever is found again is worth a try."""
PAIR = PairKey("a target", "a draft")


@pytest.fixture(scope="module")
def models(toy_pair: Callable[..., tuple[Path, Path]]) -> tuple[NumpyBackend, Pair, Tokenizer]:
    folders, backend = toy_pair(noise=0.05), NumpyBackend()
    target, draft = (backend.load(folder, max_kv_cache_tokens=200) for folder in folders)
    return backend, Pair(target, draft), Tokenizer.load(folders[0])


@pytest.fixture
def new_engine(models: tuple[NumpyBackend, Pair, Tokenizer]) -> Callable[..., Engine]:
    def make(**options: object) -> Engine:
        values: dict[str, object] = {"schedule": Schedule(FLAT), "suffixes": SuffixIndex(1000)}
        return Engine(*models, cache_clear_frequency=9, **{**values, **options})  # type: ignore[arg-type]

    return make


def request(engine: Engine, text: str = "Hello there", **options: object) -> Request:
    values: dict[str, object] = {"sampling": GREEDY, "max_tokens": 60, "num_draft_tokens": 2}
    tokens = engine.tokenizer.chat_tokens([Message("user", text)])
    return Request(tokens, **{**values, "num_suffix_tokens": 15, **options})  # type: ignore[arg-type]


def kept(completion: Completion) -> int:
    return completion.tally.suffix_accepted_tokens


def test_what_was_written_is_drafted_when_it_comes_again(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    first, again = (engine.complete(request(engine)) for _ in range(2))
    assert again.token_ids == first.token_ids
    assert kept(again) > kept(first)
    assert again.tally.rounds < first.tally.rounds
    assert again.tally.suffix_rounds < again.tally.rounds
    alone = engine.complete(request(engine, num_draft_tokens=0, num_suffix_tokens=0))
    assert alone.token_ids == first.token_ids
    assert alone.tally.rounds == len(alone.token_ids)


def test_without_matches_an_answer_neither_draws_on_others_nor_helps_them(
    new_engine: Callable[..., Engine],
) -> None:
    index = SuffixIndex(1000)
    engine = new_engine(suffixes=index)
    assert index.answers is not None
    apart = [engine.complete(request(engine, num_suffix_tokens=0)) for _ in range(2)]
    assert [one.tally.suffix_drafted_tokens for one in apart] == [0, 0]
    assert index.answers.end == 0
    written = engine.complete(request(engine)).token_ids
    assert [index.answers[position] for position in range(len(written))] == list(written)


def test_matches_alone_draft_without_the_model(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    first, again = (engine.complete(request(engine, num_draft_tokens=0)) for _ in range(2))
    assert (first.tally.drafted_tokens, again.tally.drafted_tokens) == (0, 0)
    assert kept(again) > len(again.token_ids) // 2


def test_an_answer_that_is_broken_off_helps_as_far_as_it_came(new_engine: Callable[..., Engine]) -> None:
    engine, whole = new_engine(), new_engine()
    stream = engine.stream(request(engine))
    seen = [next(stream) for _ in range(30)]
    assert not any(isinstance(event, Completion) for event in seen)
    stream.close()  # type: ignore[attr-defined]
    whole.complete(request(whole))
    fresh = new_engine()
    counts = [kept(one.complete(request(one))) for one in (fresh, engine, whole)]
    assert counts[0] < counts[1] < counts[2]


def test_a_seed_gives_the_same_sample_whatever_was_written_before(new_engine: Callable[..., Engine]) -> None:
    fresh, taught = new_engine(), new_engine()
    seeded = [request(fresh, sampling=SAMPLED, seed=seed) for seed in range(4)]
    alone = [new_engine().complete(one) for one in seeded]
    for one in alone:
        taught.complete(request(taught, sampling=SAMPLED))
        # An answer that begins as the seeded one does, from an earlier text that the index would draft from.
        taught.experience.suffixes.add_answer(one.token_ids[:-1] + (5,) * 20)
    again = [taught.complete(one) for one in seeded]
    assert [one.token_ids for one in again] == [one.token_ids for one in alone]
    assert [one.tally for one in again] == [one.tally for one in alone]


def test_modes_of_a_benchmark_learn_nothing_from_each_other(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    modes = [
        Ours(name, "", engine, engine.experience.anew(), k, matched)
        for name, k, matched in (("target", 0, 0), ("speculative", 2, 15), ("draft", 2, 0), ("suffix", 0, 15))
    ]
    job = Job(tuple(request(engine).prompt_tokens), 60, GREEDY, 0)
    alone = new_engine()
    expected = {
        name: alone.complete(
            request(alone, num_draft_tokens=k, num_suffix_tokens=15), None, alone.experience.anew()
        )
        for name, k in (("speculative", 2), ("suffix", 0))
    }
    for order in (modes, modes[::-1]):
        fresh = [
            Ours(one.name, "", engine, engine.experience.anew(), one.num_draft_tokens, one.num_suffix_tokens)
            for one in order
        ]
        (answers,) = interleave(fresh, [job], lambda *_: None)
        assert answers["target"].rounds == 60
        for name, completion in expected.items():
            assert answers[name].rounds == completion.tally.rounds
    (_, second) = interleave(modes, [job, job], lambda *_: None)
    assert (second["suffix"].rounds or 0) < expected["suffix"].tally.rounds


def test_the_store_keeps_matches_apart(new_engine: Callable[..., Engine], tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=10) as store:
        engine = new_engine(recorder=Recorder(store, PAIR, 20))
        asked = [request(engine, provenance=Provenance("jokes", "chat")) for _ in range(2)]
        completions = [engine.complete(one) for one in asked]
        summaries = store.requests.list(PAIR)
        record = store.requests.load([summaries[1].id])[0]
    tally = completions[1].tally
    for stored in (summaries[1], record):
        assert stored.rounds == tally.rounds
        assert (stored.drafted_tokens, stored.accepted_tokens) == (
            tally.drafted_tokens,
            tally.accepted_tokens,
        )
        assert (stored.suffix_rounds, stored.suffix_tokens) == (tally.suffix_rounds, tally.suffix_tokens)
        assert stored.suffix_drafted_tokens == tally.suffix_drafted_tokens > 0
        assert stored.suffix_accepted_tokens == tally.suffix_accepted_tokens > 0
        assert 0 < stored.suffix_s < stored.decode_s
    assert record.accepted_tokens + record.suffix_accepted_tokens + record.rounds >= len(record.answer_tokens)
    suffix = list(TokenKind).index(TokenKind.SUFFIX)
    assert (record.traces.kinds == suffix).sum() == tally.suffix_accepted_tokens
    assert (record.traces.draft_ids[record.traces.kinds == suffix] == -1).all()
    assert (record.traces.top_ids[:, 0] == record.answer_tokens).all()


def test_the_prompt_is_indexed_while_it_is_read(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round's time, which counts as decoding, holds none of it."""
    followed, append = [], TokenTrail.append
    monkeypatch.setattr(
        TokenTrail, "append", lambda trail, token: followed.append(token) or append(trail, token)
    )
    engine = new_engine()
    asked = request(engine, "Hello there " * 5, max_tokens=3)
    for event in engine.stream(asked):
        if isinstance(event, PromptProgress):
            assert followed == list(asked.prompt_tokens[: event.done_tokens])
    assert len(followed) >= len(asked.prompt_tokens)
