"""The engine through its events: text, counts, stops, and what it leaves behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec
from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.engine import Completion, Engine, PromptProgress, Request, RoundDone, TextPiece
from draftloop.errors import ContextFull, InputError
from draftloop.learning.deployment import Change, Deployed
from draftloop.learning.recorder import Answered, Provenance
from draftloop.models.grammar import Grammars
from draftloop.models.messages import Message
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.round import decode
from draftloop.speculation.stream import DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import FinishReason, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SAMPLED = Sampling(temperature=0.9)
CACHE_TOKENS = 160


class CountingBackend(NumpyBackend):
    """Counts how often its spare memory is taken back."""

    def __init__(self) -> None:
        super().__init__()
        self.cleared = 0

    def clear_cache(self) -> None:
        self.cleared += 1


@pytest.fixture(scope="module")
def folders(toy_pair: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return toy_pair(noise=0.05)


@pytest.fixture
def engine(folders: tuple[Path, Path]) -> Engine:
    backend = CountingBackend()
    target, draft = (backend.load(folder, max_kv_cache_tokens=CACHE_TOKENS) for folder in folders)
    return Engine(backend, Pair(target, draft), Tokenizer.load(folders[0]), cache_clear_frequency=3)


def request(engine: Engine, text: str = "Hello there", **options: object) -> Request:
    values: dict[str, object] = {"sampling": SAMPLED, "max_tokens": 24, "num_draft_tokens": 4, "seed": 5}
    tokens = engine.tokenizer.chat_tokens([Message("user", text)])
    return Request(prompt_tokens=tokens, **{**values, **options})  # type: ignore[arg-type]


def test_events_come_in_order_and_add_up(engine: Engine) -> None:
    events = list(engine.stream(request(engine)))
    completion = events[-1]
    assert isinstance(completion, Completion)
    progress = [event for event in events if isinstance(event, PromptProgress)]
    assert progress == events[: len(progress)]
    assert progress[-1].done_tokens == completion.prompt_tokens - 1
    assert "".join(event.text for event in events if isinstance(event, TextPiece)) == completion.text
    rounds = [event.outcome for event in events if isinstance(event, RoundDone)]
    assert len(rounds) == completion.tally.rounds
    assert tuple(token for outcome in rounds for token in outcome.tokens) == completion.token_ids
    assert all(outcome.trace is None for outcome in rounds)
    assert completion.tally.completion_tokens == len(completion.token_ids)
    assert completion.text == engine.tokenizer.decode(completion.token_ids)


def test_each_round_tells_its_trace_where_one_is_asked_for(engine: Engine) -> None:
    *events, completion = engine.stream(request(engine, trace=True))
    assert isinstance(completion, Completion)
    rounds = [event.outcome for event in events if isinstance(event, RoundDone)]
    assert [outcome.trace for outcome in rounds] == list(completion.traces)


def counts_agree(completion: Completion) -> None:
    tally = completion.tally
    assert tally.completion_tokens == len(completion.token_ids)
    assert sum(len(trace.top_ids) for trace in completion.traces) == len(completion.token_ids)
    assert tally.accepted_tokens <= tally.drafted_tokens
    assert tally.rounds <= tally.completion_tokens <= tally.accepted_tokens + tally.rounds


def test_a_stop_string_cuts_text_tokens_and_counts(engine: Engine) -> None:
    whole = engine.complete(request(engine, trace=True))
    counts_agree(whole)
    cuts = 0
    for start in range(2, len(whole.text) - 2, 3):
        stop = whole.text[start : start + 2]
        cut = engine.complete(request(engine, stop=(stop,), trace=True))
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason is FinishReason.STOP
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert stop in engine.tokenizer.decode(cut.token_ids)
        assert stop not in engine.tokenizer.decode(cut.token_ids[:-1])
        counts_agree(cut)
        cuts += len(cut.token_ids) < len(whole.token_ids)
    assert cuts > 0


def test_eos_inside_a_round_cuts_counts_and_trace(engine: Engine) -> None:
    asked = request(engine)
    whole = engine.complete(asked).token_ids
    inside = 0
    for eos in sorted(set(whole)):
        conversation = engine.open_conversation()
        list(read_prompt(engine.pair, conversation, asked.prompt_tokens))
        settings = DecodeSettings(SAMPLED, 24, frozenset([eos]), num_draft_tokens=4, seed=5, trace=True)
        rounds = list(decode(engine.pair, Stream(conversation, settings)))
        tokens = [token for outcome in rounds for token in outcome.tokens]
        assert tuple(tokens) == whole[: whole.index(eos) + 1]
        assert rounds[-1].finish_reason is FinishReason.STOP
        assert conversation.tokens == [*asked.prompt_tokens, *tokens]
        for outcome in rounds:
            assert outcome.trace is not None
            assert len(outcome.trace.top_ids) == len(outcome.kinds) == len(outcome.tokens)
            assert outcome.accepted_tokens <= outcome.drafted_tokens
            assert len(outcome.alphas) <= outcome.drafted_tokens
        inside += rounds[-1].accepted_tokens == len(rounds[-1].tokens)
    assert inside > 0


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    for max_tokens in (1, 2, 3, 7):
        completion = engine.complete(request(engine, max_tokens=max_tokens, min_tokens=max_tokens))
        assert len(completion.token_ids) == max_tokens
    assert completion.finish_reason is FinishReason.LENGTH


def test_a_stream_closed_midway_leaves_the_conversation_whole(engine: Engine) -> None:
    asked = request(engine, sampling=Sampling(), min_tokens=20)
    expected = engine.complete(asked)
    for closed_after in range(1, 8):
        conversation = engine.open_conversation()
        stream = engine.stream(asked, conversation)
        for _ in range(closed_after):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        again = engine.complete(asked, conversation)
        assert again.token_ids == expected.token_ids


def test_a_second_turn_reads_only_what_is_new(engine: Engine) -> None:
    conversation = engine.open_conversation()
    first = engine.complete(request(engine, sampling=Sampling()), conversation)
    assert first.cached_tokens == 0
    messages = [Message("user", "Hello there"), Message("assistant", first.text), Message("user", "Go on")]
    tokens = engine.tokenizer.chat_tokens(messages)
    asked = Request(tokens, Sampling(), 12, 4, seed=1)
    second = engine.complete(asked, conversation)
    assert second.cached_tokens >= first.prompt_tokens - 1
    assert second.token_ids == engine.complete(asked).token_ids


def test_another_conversation_in_the_same_caches_is_not_remembered(engine: Engine) -> None:
    conversation = engine.open_conversation()
    engine.complete(request(engine, "Something quite different, and longer than the other"), conversation)
    asked = request(engine, sampling=Sampling())
    assert engine.complete(asked, conversation).token_ids == engine.complete(asked).token_ids


def test_spare_memory_is_given_back_every_third_answer(engine: Engine) -> None:
    backend = engine.backend
    assert isinstance(backend, CountingBackend)
    for _ in range(2):
        engine.complete(request(engine, max_tokens=2))
    assert backend.cleared == 0
    stopped = engine.stream(request(engine))
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    assert backend.cleared == 1


def test_a_seed_that_was_drawn_is_told(engine: Engine) -> None:
    drawn = engine.complete(request(engine, seed=None))
    assert engine.complete(request(engine, seed=drawn.seed)).token_ids == drawn.token_ids


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_nothing_asked_is_refused(engine: Engine, max_tokens: int) -> None:
    with pytest.raises(InputError, match=str(max_tokens)):
        engine.complete(request(engine, max_tokens=max_tokens))


@pytest.mark.parametrize(
    "wrong", [{"logit_bias": {272: 1.0}}, {"presence_penalty": 2.1}, {"frequency_penalty": float("nan")}]
)
def test_steering_out_of_bounds_is_refused(engine: Engine, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        engine.complete(request(engine, **wrong))


def test_a_grammar_ends_the_answer_and_leaves_the_conversation_whole(engine: Engine) -> None:
    grammars = Grammars(engine.tokenizer, engine.pair.target.architecture.vocab_size)
    conversation = engine.open_conversation()
    schema = {"type": "array", "items": {"enum": ["on", "off"]}, "minItems": 2, "maxItems": 3}
    # Blanks are as likely as anything in a toy's JSON.
    blanks = {token: -50.0 for token in range(256) if engine.tokenizer.decode([token]).isspace()}
    answers = []
    for _ in range(2):
        steered = request(
            engine, grammar=grammars.json_schema(schema), logit_bias=blanks, min_tokens=23, trace=True
        )
        answers.append(engine.complete(steered, conversation))
        assert answers[-1].finish_reason is FinishReason.STOP
        assert 2 <= len(json.loads(answers[-1].text)) <= 3
        counts_agree(answers[-1])
        assert sum(len(trace.top_ids) for trace in answers[-1].traces) == len(answers[-1].token_ids)
    assert answers[0].token_ids == answers[1].token_ids
    # Nothing of it stays with the conversation.
    assert engine.complete(request(engine), conversation).text == engine.complete(request(engine)).text


def test_a_prompt_that_fills_the_cache_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextFull, match=str(CACHE_TOKENS)):
        engine.complete(Request([1] * CACHE_TOKENS, SAMPLED, 8, 4))
    last = engine.complete(Request([40] * (CACHE_TOKENS - 1), SAMPLED, 8, 4, min_tokens=8))
    assert len(last.token_ids) == 1
    assert last.finish_reason is FinishReason.LENGTH


def test_an_interrupt_in_a_round_is_told_on_and_stores_what_was_said(
    engine: Engine, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Listener()
    recording = recorded_by(engine, recorder)
    verify, calls = engine.pair.target.verify, []

    def interrupted(jobs: object) -> object:
        calls.append(jobs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return verify(jobs)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.pair.target, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recording.complete(request(engine, provenance=PROVENANCE, min_tokens=20))
    (answered,) = recorder.heard
    assert answered.finish_reason == "cancelled"
    assert len(answered.rounds) == 2


def test_an_answer_is_recorded_once_and_before_its_end_is_told(engine: Engine) -> None:
    recorder = Listener()
    recording = recorded_by(engine, recorder)
    events = recording.stream(request(engine, provenance=PROVENANCE))
    for event in events:
        if isinstance(event, Completion):
            assert [len(answered.rounds) for answered in recorder.heard] == [event.tally.rounds]
            assert event.traces == ()
            events.close()  # type: ignore[attr-defined]
    assert len(recorder.heard) == 1
    recording.stream(request(engine, provenance=PROVENANCE)).close()  # type: ignore[attr-defined]
    assert len(recorder.heard) == 1


def test_a_request_without_provenance_is_not_recorded(engine: Engine) -> None:
    recorder = Listener()
    recorded_by(engine, recorder).complete(request(engine))
    assert recorder.heard == []


def test_a_swapped_adapter_changes_the_draft_and_not_the_text(engine: Engine) -> None:
    active = Wardrobe()
    dressed = Engine(
        engine.backend,
        engine.pair,
        engine.tokenizer,
        cache_clear_frequency=3,
        active_adapter=active,  # type: ignore[arg-type]
    )
    asked = request(engine, sampling=Sampling(), min_tokens=24)
    bare = dressed.complete(asked)
    conversation = dressed.open_conversation()
    assert dressed.complete(asked, conversation).adapter is None
    active.next = Change(Deployed("a0001", noisy_lora(), AdapterForm.UNFUSED))
    worn = dressed.complete(asked, conversation)
    fresh = dressed.complete(asked)
    assert (worn.adapter, dressed.adapter) == ("a0001", "a0001")
    assert worn.token_ids == fresh.token_ids == bare.token_ids
    assert worn.tally == fresh.tally != bare.tally
    active.next = Change(None)
    off = dressed.complete(asked, conversation)
    assert off.adapter is None
    assert off.tally == bare.tally


def test_the_target_alone_wears_nothing(engine: Engine) -> None:
    alone = Engine(engine.backend, Pair(engine.pair.target, None), engine.tokenizer, cache_clear_frequency=3)
    alone.wear(Deployed("a0001", noisy_lora(), AdapterForm.UNFUSED))
    assert alone.adapter is None
    assert alone.complete(request(engine)).adapter is None


PROVENANCE = Provenance("jokes", "generate")


class Listener:
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.heard: list[Answered] = []

    def record(self, answered: Answered) -> None:
        self.heard.append(answered)


class Wardrobe:
    """Tells of one change, once."""

    def __init__(self) -> None:
        self.next: Change | None = None

    def changed(self) -> Change | None:
        change, self.next = self.next, None
        return change


def recorded_by(engine: Engine, recorder: Listener) -> Engine:
    return Engine(
        engine.backend,
        engine.pair,
        engine.tokenizer,
        cache_clear_frequency=3,
        recorder=recorder,  # type: ignore[arg-type]
    )


def noisy_lora() -> Lora:
    """An adapter of the toy draft that changes what it says."""
    random = np.random.default_rng(0)
    spec = LoraSpec(rank=4, alpha=8, target_modules=("q_proj",))
    modules = {
        f"model.layers.{layer}.self_attn.q_proj": LoraModule(
            random.standard_normal((4, 64)).astype(np.float32) / 8,
            random.standard_normal((64, 4)).astype(np.float32) / 2,
        )
        for layer in range(2)
    }
    return Lora(spec, modules)
