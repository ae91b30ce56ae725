"""What is kept of past texts changes no answer, only how much of a prompt is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.backends.base import PrefillJob
from draftloop.engine import Completion, Engine, PromptProgress, Request, RoundDone
from draftloop.errors import OutOfMemory
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.prefixes import PrefixCache
from draftloop.speculation.stream import Conversation, common_prefix
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from draftloop.backends.base import Backend, Model
    from draftloop.speculation.stream import Pair

CACHE_TOKENS = 128
SYSTEM = list(range(40, 70))
ROOM = 10_000_000
PROMPTS = [[*SYSTEM, 3, 4, 5], [*SYSTEM, 6, 7], [9, 8, 7], [*SYSTEM, 3, 4, 5, 6, 7, 8], [*SYSTEM, 6, 7]]


@dataclass
class Toys:
    backend: Backend
    pair: Pair
    tokenizer: Tokenizer

    def engine(self, max_bytes: int | None) -> Engine:
        prefixes = None if max_bytes is None else PrefixCache(max_bytes)
        return Engine(self.backend, self.pair, self.tokenizer, cache_clear_frequency=9, prefixes=prefixes)


@pytest.fixture(scope="module")
def toys(
    backend: Backend, load_pair: Callable[..., Pair], toy_pair: Callable[..., tuple[Path, Path]]
) -> Toys:
    return Toys(backend, load_pair(backend, noise=0.05), Tokenizer.load(toy_pair(noise=0.05)[0]))


def request_for(prompt: list[int], temperature: float) -> Request:
    return Request(
        prompt_tokens=prompt,
        sampling=Sampling(temperature=temperature),
        max_tokens=20,
        min_tokens=20,
        num_draft_tokens=3,
        seed=7,
    )


def ask(engine: Engine, prompt: list[int], temperature: float, conversation: Any = None) -> Completion:
    return engine.complete(request_for(prompt, temperature), conversation)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_are_the_same_with_and_without(toys: Toys, temperature: float) -> None:
    without, keeping = toys.engine(None), toys.engine(ROOM)
    plain = [ask(without, prompt, temperature) for prompt in PROMPTS]
    kept = [ask(keeping, prompt, temperature) for prompt in PROMPTS]
    assert [answer.token_ids for answer in kept] == [answer.token_ids for answer in plain]
    assert [answer.tally.accepted_tokens for answer in kept] == [a.tally.accepted_tokens for a in plain]
    assert [answer.cached_tokens for answer in plain] == [0] * 5
    shares = len(SYSTEM)
    assert [answer.cached_tokens for answer in kept] == [0, shares, 0, shares + 3, shares + 1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_later_turn_is_read_on_from_the_earlier_one(toys: Toys, temperature: float) -> None:
    engine, plain = toys.engine(ROOM), toys.engine(None)
    first = ask(engine, PROMPTS[0], temperature)
    turn = [*PROMPTS[0], *first.token_ids, 11, 12]
    later = ask(engine, turn, temperature)
    # Between rounds the last token is in no cache.
    assert later.cached_tokens == len(PROMPTS[0]) + len(first.token_ids) - 1
    assert later.token_ids == ask(plain, turn, temperature).token_ids


def test_a_conversation_of_ones_own_takes_what_is_longer(toys: Toys) -> None:
    engine = toys.engine(ROOM)
    ask(engine, PROMPTS[0], 0.0)
    conversation = engine.open_conversation()
    fresh = ask(engine, PROMPTS[1], 0.0, conversation)
    assert fresh.cached_tokens == len(SYSTEM)
    other = ask(engine, PROMPTS[2], 0.0, conversation)
    assert other.cached_tokens == 0
    back = ask(engine, PROMPTS[0], 0.0, conversation)
    assert back.cached_tokens == len(PROMPTS[0]) - 1
    assert back.token_ids == ask(toys.engine(None), PROMPTS[0], 0.0).token_ids


@pytest.mark.parametrize(("last", "kept"), [(PromptProgress, 0), (RoundDone, len(PROMPTS[0]) - 1)])
def test_a_stopped_answer_leaves_what_was_read(toys: Toys, last: type, kept: int) -> None:
    engine = toys.engine(ROOM)
    events = engine.stream(request_for(PROMPTS[0], 0.0))
    assert any(isinstance(event, last) for event in events)
    events.close()
    again = ask(engine, PROMPTS[0], 0.0)
    assert again.cached_tokens == kept
    assert again.token_ids == ask(toys.engine(None), PROMPTS[0], 0.0).token_ids


def test_a_copy_is_of_its_own(backend: Backend, load_toy: Callable[..., Model]) -> None:
    """Neither the cache that it was taken from nor the one it was pasted into writes to it."""
    model = load_toy(backend)
    tokens = list(range(5, 45))
    cache = model.new_cache()
    model.prefill([PrefillJob(cache, tokens)])
    copied = cache.copy(30)
    cache.trim(25)
    model.prefill([PrefillJob(cache, [99] * 20)])
    expected = model.new_cache()
    model.prefill([PrefillJob(expected, tokens[:20])])
    wanted = model.logits(expected, tokens[20:23])
    for _ in range(2):
        cache.paste(copied, 20)
        assert cache.position == 20
        np.testing.assert_allclose(model.logits(cache, tokens[20:23]), wanted, atol=1e-4)
        model.prefill([PrefillJob(cache, [98] * 9)])
    for wrong in (0, 31):
        with pytest.raises(ValueError, match="30 tokens"):
            cache.paste(copied, wrong)
        with pytest.raises(ValueError, match="cannot copy"):
            expected.copy(wrong)


@pytest.mark.parametrize("work", ["copy", "paste"])
@pytest.mark.parametrize("model", ["target", "draft"])
def test_where_memory_runs_out_answers_go_on_and_nothing_is_kept(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, work: str, model: str
) -> None:
    engine = toys.engine(ROOM)
    plain = ask(toys.engine(None), PROMPTS[1], 0.0)
    ask(engine, PROMPTS[0], 0.0)
    conversation = engine.open_conversation()
    ask(engine, [*SYSTEM[:10], 3], 0.0, conversation)
    full = conversation.target_cache if model == "target" else conversation.draft_cache
    real = getattr(type(full), work)

    def fails(cache: Any, *args: Any) -> Any:
        result = real(cache, *args)
        if cache is full:
            if work == "paste":
                # Half of it is written over.
                cache.trim(cache.position)
                getattr(toys.pair, model).prefill([PrefillJob(cache, [99] * 20)])
            raise OutOfMemory("memory ran out while keeping a text's beginning", remedy="None.")
        return result

    with monkeypatch.context() as patched:
        patched.setattr(type(full), work, fails)
        answer = ask(engine, PROMPTS[1], 0.0, conversation)
    assert answer.token_ids == plain.token_ids
    assert answer.cached_tokens == (0 if work == "paste" else len(SYSTEM))
    kept = PROMPTS[1] if work == "paste" else []
    again = ask(engine, PROMPTS[1], 0.0)
    assert again.token_ids == plain.token_ids
    assert again.cached_tokens == max(0, len(kept) - 1)
    assert ask(engine, PROMPTS[1], 0.0).cached_tokens == len(PROMPTS[1]) - 1


def test_bytes_per_token_are_what_the_architecture_says(
    backend: Backend, load_toy: Callable[..., Model]
) -> None:
    model = load_toy(backend)
    cache = model.new_cache()
    model.prefill([PrefillJob(cache, [1, 2, 3])])
    assert cache.bytes_per_token == 4 * model.architecture.kv_values_per_token


def test_another_adapter_leaves_the_target_its_part(toys: Toys) -> None:
    prefixes = PrefixCache(ROOM)
    draft = toys.pair.draft
    assert draft is not None
    old = _conversation(toys.pair, PROMPTS[0])
    prefixes.keep(old)
    for adapter, known in ((None, len(SYSTEM)), ("a0001", 0)):
        conversation = Conversation(toys.pair)
        conversation.adapter = adapter
        prefixes.resume(conversation, PROMPTS[1])
        assert conversation.target_cache.position == len(SYSTEM)
        assert conversation.draft_cache is not None
        assert conversation.draft_cache.position == known


def test_what_a_conversation_holds_itself_is_not_shortened(toys: Toys) -> None:
    prefixes = PrefixCache(ROOM)
    prefixes.keep(_conversation(toys.pair, SYSTEM))
    conversation = _conversation(toys.pair, PROMPTS[3])
    prefixes.resume(conversation, [*PROMPTS[3], 2])
    assert conversation.target_cache.position == len(PROMPTS[3])


def _conversation(pair: Pair, tokens: list[int]) -> Conversation:
    conversation = Conversation(pair)
    conversation.tokens = [*tokens, 1]
    pair.target.prefill([PrefillJob(conversation.target_cache, tokens)])
    if pair.draft is not None and conversation.draft_cache is not None:
        pair.draft.prefill([PrefillJob(conversation.draft_cache, tokens)])
    return conversation


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=12), min_size=1, max_size=6),
    room_tokens=st.integers(0, 20),
)
def test_the_newest_that_fit_are_kept(toys: Toys, texts: list[list[int]], room_tokens: int) -> None:
    """The bound holds after each text, and the newest text is always found as far as the bound allows."""
    token_bytes = _token_bytes(toys.pair)
    prefixes = PrefixCache(room_tokens * token_bytes)
    for text in texts:
        prefixes.keep(_conversation(toys.pair, text))
        assert prefixes.num_bytes <= prefixes.max_bytes
        conversation = Conversation(toys.pair)
        prefixes.resume(conversation, [*text, 2])
        assert conversation.target_cache.position == min(len(text), room_tokens)
        assert common_prefix(conversation.tokens, text) == (len(text) if room_tokens else 0)


def test_the_least_recently_used_goes_first(toys: Toys) -> None:
    prefixes = PrefixCache(20 * _token_bytes(toys.pair))
    texts = [[value] * 10 for value in (3, 4, 5)]
    for text in texts[:2]:
        prefixes.keep(_conversation(toys.pair, text))
    prefixes.resume(Conversation(toys.pair), [*texts[0], 9])
    prefixes.keep(_conversation(toys.pair, texts[2]))
    found = []
    for text in texts:
        conversation = Conversation(toys.pair)
        prefixes.resume(conversation, [*text, 9])
        found.append(conversation.target_cache.position)
    assert found == [10, 0, 10]


def _token_bytes(pair: Pair) -> int:
    caches = (cache for c in [_conversation(pair, [1, 2])] for cache in (c.target_cache, c.draft_cache))
    return sum(cache.bytes_per_token for cache in caches if cache is not None)
