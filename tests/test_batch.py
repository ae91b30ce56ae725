"""Several answers at once through the engine: each as alone, whoever joins, fails or leaves beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.answers import Failed
from draftloop.backends.lora import AdapterForm
from draftloop.backends.registry import open_backend
from draftloop.engine import Completion, Engine, PromptProgress, Request, RoundDone, TextPiece
from draftloop.errors import ContextFull, GrammarFailed, InputError
from draftloop.learning.deployment import Change, Deployed
from draftloop.learning.recorder import Provenance
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.prefixes import PrefixCache
from draftloop.speculation.schedule import Schedule
from draftloop.speculation.stream import Pair
from draftloop.types import Sampling

if TYPE_CHECKING:
    from draftloop.member import Member

GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95)
CHEAP = RoundCosts(((1, 1.0), (40, 1.4)), 0.05, 0.0, 0.01, verify_more_s=0.01, draft_more_s=0.01)
PROVENANCE = Provenance("jokes", "generate")
CACHE_TOKENS = 400


class Listener:
    """A recorder that remembers."""

    def __init__(self):
        self.heard = []

    def record(self, answered):
        self.heard.append(answered)


class Wardrobe:
    """Tells of one change, once."""

    def __init__(self):
        self.next = None

    def changed(self):
        change, self.next = self.next, None
        return change


@pytest.fixture(scope="module")
def new_engine(toy_pair):
    target, draft = toy_pair(noise=0.05)
    backend = open_backend("numpy", device="cpu")
    pair = Pair(*(backend.load(folder, max_kv_cache_tokens=CACHE_TOKENS) for folder in (target, draft)))
    tokenizer = Tokenizer.load(target)

    def new(**options):
        engine = Engine(
            backend, pair, tokenizer, **{"cache_clear_frequency": 100, "most_together": 4, **options}
        )
        # How many pieces a prompt is read in depends on seconds, and so does what rounds together draft.
        engine.batch = partial(engine.batch, clock=count().__next__)
        return engine

    return new


def request(seed=0, length=12, **options):
    prompt = np.random.default_rng(seed).integers(0, 256, length).tolist()
    return Request(
        prompt, **{"sampling": GREEDY, "max_tokens": 12, "num_draft_tokens": 3, "seed": 5} | options
    )


def run(batch, steps=10_000):
    """Each member's events until nobody is left, or so many steps are over."""
    told: dict[Member, list] = {member: [] for member in batch.members}
    while batch.members and steps:
        steps -= 1
        for member, event in batch.step():
            told.setdefault(member, []).append(event)
    return told


def rounds_of(events):
    return [event.outcome for event in events if isinstance(event, RoundDone)]


@dataclass(frozen=True, slots=True)
class Visit:
    """A request that joins before a step, and leaves after so many steps at the latest."""

    joins: int
    steps: int
    request: Request


visits = st.builds(
    Visit,
    joins=st.integers(0, 8),
    steps=st.sampled_from((1, 3, 6, 100)),
    request=st.builds(
        request,
        seed=st.integers(0, 99),
        length=st.sampled_from((1, 2, 30, 90)),
        sampling=st.sampled_from((GREEDY, SAMPLED)),
        max_tokens=st.integers(1, 14),
        num_draft_tokens=st.integers(0, 4),
        num_suffix_tokens=st.sampled_from((0, 6)),
        stop=st.sampled_from(((), ("e",))),
    ),
)


@pytest.mark.parametrize("scheduled", [False, True])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(guests=st.lists(visits, min_size=2, max_size=6))
def test_each_answer_is_the_one_it_would_be_alone(new_engine, scheduled, guests):
    engine = new_engine(schedule=Schedule(CHEAP) if scheduled else None, prefixes=PrefixCache(1_000_000))
    waiting, present, now = list(guests), {}, 0
    with engine.batch() as batch:
        while waiting or present:
            now += 1
            for visit in [one for one in waiting if one.joins <= now or not present]:
                if batch.places:
                    present[batch.join(visit.request)] = (visit, now, [])
                    waiting.remove(visit)
            for member, event in batch.step():
                present[member][2].append(event)
            for member, (visit, joined, events) in list(present.items()):
                gone = now - joined >= visit.steps
                if gone:
                    batch.leave(member)
                if gone or (events and isinstance(events[-1], Completion)):
                    assert_as_alone(new_engine(), visit.request, events)
                    del present[member]


def assert_as_alone(engine, asked, events):
    alone = engine.complete(asked)
    text = "".join(event.text for event in events if isinstance(event, TextPiece))
    tokens = tuple(token for outcome in rounds_of(events) for token in outcome.tokens)
    if events and isinstance(events[-1], Completion):
        assert events[-1].text == text == alone.text
        assert events[-1].token_ids == alone.token_ids
        assert events[-1].finish_reason == alone.finish_reason
    assert alone.text.startswith(text)
    assert alone.token_ids[: len(tokens)] == tokens[: len(alone.token_ids)]


def test_a_long_prompt_is_read_between_the_others_rounds(new_engine, monkeypatch):
    """A token takes a second to read and a round twenty: others' tokens come half as often at worst."""
    engine, now_s = new_engine(), [0.0]
    target, takes_s = (
        engine.pair.target,
        {"prefill": lambda jobs: len(jobs[0].tokens), "verify": lambda _: 20},
    )
    for name, seconds in takes_s.items():
        work = getattr(target, name)
        monkeypatch.setattr(
            target, name, lambda jobs, w=work, s=seconds: (now_s.append(now_s[-1] + s(jobs)), w(jobs))[1]
        )
    with engine.batch(clock=lambda: now_s[-1]) as batch:
        quick = batch.join(request(max_tokens=100))
        for _ in batch.step():
            pass
        late = batch.join(request(1, length=300))
        pieces, told, before_s = [], [0], now_s[-1]
        while late.reads:
            events = list(batch.step())
            told += [event.done_tokens for _, event in events if isinstance(event, PromptProgress)]
            assert any(who is quick and isinstance(event, RoundDone) for who, event in events)
            pieces.append(now_s[-1] - before_s - 20)
            before_s = now_s[-1]
    assert sum(pieces) == 299
    assert max(pieces) <= 20
    assert len(pieces) <= 20
    assert told == sorted(told)


def test_where_nobody_watches_all_prompts_are_read_at_once(new_engine):
    with new_engine().batch(whole_prompts=True) as batch:
        members = [batch.join(request(seed, length=300)) for seed in range(3)]
        told = [event.done_tokens for _, event in batch.step() if isinstance(event, PromptProgress)]
        assert told == [0, 256, 299] * 3
        assert not any(member.reads for member in members)


def test_a_prompt_that_is_read_alone_is_read_in_large_pieces(new_engine):
    with new_engine().batch() as batch:
        batch.join(request(1, length=300))
        told = [event.done_tokens for _, event in batch.step() if isinstance(event, PromptProgress)]
    assert told == [0, 256]


def test_who_cannot_be_answered_fails_alone(new_engine):
    engine = new_engine()
    with engine.batch() as batch:
        well = batch.join(request())
        too_long = batch.join(request(1, length=CACHE_TOKENS))
        with pytest.raises(InputError):
            batch.join(request(max_tokens=0))
        told = run(batch)
    (failed,) = told[too_long]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ContextFull)
    assert told[well][-1].token_ids == engine.complete(request()).token_ids


def test_a_round_that_fails_ends_those_who_shared_it(new_engine, monkeypatch):
    engine, recorder = new_engine(), Listener()
    with engine.batch() as batch:
        both = {batch.join(request(seed)) for seed in range(2)}
        run(batch, steps=2)
        reading = batch.join(request(2, length=200))
        verify = engine.pair.target.verify

        def fails(jobs):
            monkeypatch.setattr(engine.pair.target, "verify", verify)
            raise RuntimeError("nobody's own")

        monkeypatch.setattr(engine.pair.target, "verify", fails)
        told = run(batch)
    assert {who for who, events in told.items() if isinstance(events[-1], Failed)} == both
    assert told[reading][-1].token_ids == engine.complete(request(2, length=200)).token_ids
    assert not recorder.heard


class Breaking:
    """A grammar that allows everything and cannot be followed beyond so many tokens."""

    def __init__(self, most):
        self.most, self.said, self.ended = most, 0, False

    def start(self):
        return Breaking(self.most)

    def allowed(self, drafted):
        if self.said + len(drafted) >= self.most:
            raise GrammarFailed("too complex", remedy="Choose another one.")
        return np.ones(272, bool)

    def num_allowed(self, tokens):
        return len(tokens)

    def advance(self, tokens):
        self.said += len(tokens)
        return len(tokens)


@pytest.mark.parametrize("most", [0, 2, 7])
def test_whose_grammar_fails_fails_alone(new_engine, most):
    recorder = Listener()
    engine = new_engine(recorder=recorder)
    conversation = engine.open_conversation()
    with engine.batch() as batch:
        well = batch.join(request())
        asked = request(1, grammar=Breaking(most), provenance=PROVENANCE)
        breaks = batch.join(asked, conversation)
        told = run(batch)
    assert isinstance(told[breaks][-1], Failed)
    assert isinstance(told[breaks][-1].error, GrammarFailed)
    said = tuple(token for outcome in rounds_of(told[breaks]) for token in outcome.tokens)
    assert len(said) <= most
    assert [answered.finish_reason for answered in recorder.heard] == ["cancelled"] * bool(said)
    assert told[well][-1].token_ids == engine.complete(request()).token_ids
    assert engine.complete(request(1), conversation).token_ids == engine.complete(request(1)).token_ids
    with pytest.raises(GrammarFailed):
        engine.complete(request(1, grammar=Breaking(most)))


@pytest.mark.parametrize("part", ["take", "end", "completion"])
def test_whose_own_end_fails_fails_alone(new_engine, part):
    engine = new_engine()

    def broken(*_):
        raise KeyError(part)

    with engine.batch() as batch:
        members = [batch.join(request(seed)) for seed in range(3)]
        setattr(members[1].answer, part, broken)
        told = run(batch)
    assert isinstance(told[members[1]][-1], Failed)
    assert isinstance(told[members[1]][-1].error, KeyError)
    assert members[1].over
    for seed in (0, 2):
        assert told[members[seed]][-1].token_ids == engine.complete(request(seed)).token_ids


class Failing(Listener):
    """A recorder that fails at the first requests it is told of."""

    def __init__(self, *words):
        super().__init__()
        self.words = list(words)

    def record(self, answered):
        super().record(answered)
        if self.words:
            raise RuntimeError(self.words.pop(0))


def test_where_breaking_off_fails_the_others_are_stored_and_closed_all_the_same(new_engine):
    recorder, members = Failing("the first", "the second"), []
    batch = new_engine(recorder=recorder).batch()

    def left():
        with batch:
            asked = [request(seed, max_tokens=30, provenance=PROVENANCE) for seed in range(3)]
            members.extend(map(batch.join, asked))
            run(batch, steps=5)

    with pytest.raises(RuntimeError, match="the first"):
        left()
    assert len(recorder.heard) == 3
    assert all(member.over for member in members)
    assert not batch.members


def test_who_leaves_is_gone_also_where_that_fails(new_engine):
    with new_engine(recorder=Failing("the first")).batch() as batch:
        leaving, staying = (batch.join(request(seed, provenance=PROVENANCE)) for seed in range(2))
        run(batch, steps=3)
        with pytest.raises(RuntimeError, match="the first"):
            batch.leave(leaving)
        assert batch.members == (staying,)


def test_who_leaves_is_stored_and_leaves_a_whole_conversation(new_engine):
    recorder = Listener()
    engine = new_engine(recorder=recorder)
    conversation = engine.open_conversation()
    with engine.batch() as batch:
        asked = request(max_tokens=30, provenance=PROVENANCE)
        leaving, staying = batch.join(asked, conversation), batch.join(request(1))
        run(batch, steps=3)
        batch.leave(leaving)
        batch.leave(leaving)
        assert batch.members == (staying,)
        told = run(batch)
    assert [answered.finish_reason for answered in recorder.heard] == ["cancelled"]
    assert told[staying][-1].token_ids == engine.complete(request(1)).token_ids
    assert engine.complete(asked, conversation).token_ids == engine.complete(asked).token_ids


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whoever_breaks_out_stores_what_was_said(new_engine, error):
    recorder = Listener()
    engine = new_engine(recorder=recorder)
    batch = engine.batch()

    def broken_out():
        with batch:
            for seed in range(2):
                batch.join(request(seed, max_tokens=30, provenance=PROVENANCE))
            run(batch, steps=3)
            raise error

    with pytest.raises(error):
        broken_out()
    assert [answered.finish_reason for answered in recorder.heard] == ["cancelled"] * 2
    assert not batch.members


def test_more_than_the_plan_has_room_for_wait(new_engine):
    with new_engine(most_together=2).batch() as batch:
        assert batch.places == 2
        batch.join(request())
        second = batch.join(request(1))
        assert batch.places == 0
        with pytest.raises(ValueError, match="2 answers are on their way"):
            batch.join(request(2))
        batch.leave(second)
        assert batch.places == 1


def test_another_adapter_is_worn_when_nobody_is_answered(new_engine):
    wardrobe, asked = Wardrobe(), request(max_tokens=20)
    engine = new_engine(active_adapter=wardrobe)
    from test_engine import noisy_lora

    with engine.batch() as batch:
        batch.join(asked)
        assert batch.places == 3
        run(batch, steps=1)
        wardrobe.next = Change(Deployed("a0001", noisy_lora(), AdapterForm.UNFUSED))
        assert batch.places == 0
        told = run(batch)
        assert [events[-1].adapter for events in told.values()] == [None]
        assert batch.places == 4
        batch.join(asked)
        assert engine.adapter == "a0001"
        told = run(batch)
    assert [events[-1].adapter for events in told.values()] == ["a0001"]
    engine.wear(None)


def test_what_is_shared_is_told_as_nobodys_own(new_engine):
    with new_engine().batch() as batch:
        for seed in range(2):
            batch.join(request(seed))
        told = run(batch)
    for events in told.values():
        assert any(outcome.seconds is None for outcome in rounds_of(events))
        assert events[-1].decode_s > 0
        assert events[-1].tally.completion_tokens == 12
