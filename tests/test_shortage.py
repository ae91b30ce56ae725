"""Memory that runs out: who is not yet answered waits, a round is taken in parts, and nobody fails others."""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.answers import Failed, PutOff
from draftloop.backends.registry import open_backend
from draftloop.engine import Completion, Engine, Request, RoundDone
from draftloop.errors import OutOfMemory
from draftloop.learning.recorder import Provenance
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.prefixes import PrefixCache
from draftloop.speculation.schedule import Schedule
from draftloop.speculation.stream import Pair
from draftloop.types import Sampling

GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95)
CHEAP = RoundCosts(((1, 1.0), (40, 1.4)), 0.05, 0.0, 0.01, verify_more_s=0.01, draft_more_s=0.01)
WORK = ("new_cache", "prefill", "propose", "verify")


class Scarce:
    """A model without memory where `lacks` says so. Like some backends it has counted the tokens by then."""

    def __init__(self, model):
        self._model = model
        self.lacks = lambda name, jobs: False
        self.asked = []

    def __getattr__(self, name):
        work = getattr(self._model, name)
        return (lambda *jobs: self._tried(name, work, *jobs)) if name in WORK else work

    def _tried(self, name, work, jobs=()):
        self.asked.append(name)
        if self.lacks(name, jobs):
            for job in jobs:
                job.cache.extend(1)
            raise OutOfMemory("memory ran out", remedy="Wait.")
        return work(jobs) if jobs else work()


def ticking(engine):
    """By a clock of its own: how prompts are cut, who is active when, what is drafted depend on seconds."""
    engine.batch = partial(engine.batch, clock=count().__next__)
    return engine


@pytest.fixture(scope="module")
def loaded(toy_pair):
    target, draft = toy_pair(noise=0.05)
    backend = open_backend("numpy", device="cpu")
    models = [backend.load(folder, max_kv_cache_tokens=400) for folder in (target, draft)]
    return backend, models, Tokenizer.load(target)


@pytest.fixture
def new_engine(loaded):
    backend, models, tokenizer = loaded

    def new(**options):
        pair = Pair(*map(Scarce, models))
        options = {"cache_clear_frequency": 100, "most_together": 4, **options}
        return ticking(Engine(backend, pair, tokenizer, **options))

    return new


def request(seed=0, length=12, **options):
    prompt = np.random.default_rng(seed).integers(0, 256, length).tolist()
    return Request(
        prompt, **{"sampling": GREEDY, "max_tokens": 12, "num_draft_tokens": 3, "seed": 5} | options
    )


def answered(engine, requests):
    """The last event of each request; who is put off is the next one to join."""
    waiting, asked, ends = deque(enumerate(requests)), {}, {}
    with engine.batch() as batch:
        while waiting or batch.members:
            while waiting and batch.places:
                try:
                    asked[batch.join(waiting[0][1])] = waiting[0]
                except OutOfMemory:
                    assert batch.members
                    assert not batch.places
                else:
                    waiting.popleft()
            for member, event in batch.step():
                if isinstance(event, PutOff):
                    assert member not in batch.members
                    waiting.appendleft(asked[member])
                elif isinstance(event, Completion | Failed):
                    ends[asked[member][0]] = event
    return [ends[index] for index in range(len(requests))]


@pytest.mark.parametrize("scheduled", [False, True])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.builds(
            request,
            seed=st.integers(0, 99),
            length=st.sampled_from((1, 2, 30)),
            sampling=st.sampled_from((GREEDY, SAMPLED)),
            max_tokens=st.integers(1, 14),
            num_draft_tokens=st.integers(0, 4),
            num_suffix_tokens=st.sampled_from((0, 6)),
            presence_penalty=st.sampled_from((0.0, 0.7)),
        ),
        min_size=2,
        max_size=5,
    ),
    lacking=st.lists(st.sets(st.integers(0, 60)), min_size=2, max_size=2),
)
def test_each_answer_is_the_one_it_would_be_with_memory_enough(loaded, scheduled, requests, lacking):
    backend, models, tokenizer = loaded
    pair = Pair(*map(Scarce, models))
    schedule = Schedule(CHEAP) if scheduled else None
    engine = ticking(
        Engine(backend, pair, tokenizer, cache_clear_frequency=9, most_together=4, schedule=schedule)
    )
    open_caches = []

    def lacks_at(model, calls):
        def lacks(name, jobs):
            # Alone, a text has all the memory that it needs.
            beside = len(open_caches) > 1 if name in ("new_cache", "prefill") else len(jobs) > 1
            return beside and len(model.asked) in calls

        return lacks

    for model, calls in zip((pair.target, pair.draft), lacking, strict=True):
        model.lacks = lacks_at(model, calls)
    plain = engine._begin

    def begin(*arguments):
        open_caches.append(None)
        try:
            member = plain(*arguments)
        except OutOfMemory:
            open_caches.pop()
            raise
        member._answering.callback(open_caches.pop)
        return member

    engine._begin = begin
    ends = answered(engine, requests)
    alone = Engine(backend, Pair(*models), tokenizer, cache_clear_frequency=9)
    for asked, end in zip(requests, ends, strict=True):
        assert isinstance(end, Completion)
        wanted = alone.complete(asked)
        assert (end.token_ids, end.finish_reason) == (wanted.token_ids, wanted.finish_reason)


@pytest.mark.parametrize("which", ["target", "draft"])
def test_who_finds_no_room_for_its_caches_may_join_when_somebody_has_left(new_engine, which):
    engine = new_engine()
    model = getattr(engine.pair, which)
    with engine.batch() as batch:
        short, long = batch.join(request()), batch.join(request(1, max_tokens=40))
        model.lacks = lambda name, _: name == "new_cache" and len(batch.members) == 2
        with pytest.raises(OutOfMemory):
            batch.join(request(2))
        tries = model.asked.count("new_cache")
        while not short.over:
            assert batch.places == 0
            [*batch.step()]
        assert batch.members == (long,)
        assert batch.places == 3
        late = batch.join(request(2))
        ends = {}
        while batch.members:
            ends.update(batch.step())
    assert model.asked.count("new_cache") == tries + 1
    assert ends[late].token_ids == engine.complete(request(2)).token_ids


@pytest.mark.parametrize("which", ["target", "draft"])
def test_who_finds_no_room_for_its_prompt_is_put_off_before_anything_was_said(new_engine, which):
    engine = new_engine()
    conversation, model = engine.open_conversation(), getattr(engine.pair, which)
    with engine.batch() as batch:
        first = batch.join(request(max_tokens=40))
        [*batch.step()]
        # The second piece of a long prompt.
        reading = batch.join(request(1, length=200), conversation)
        [*batch.step()]
        model.lacks = lambda name, _: name == "prefill"
        told = [event for member, event in batch.step() if member is reading]
        assert [type(event) for event in told] == [PutOff]
        assert reading.over
        assert batch.members == (first,)
        assert batch.places == 0
        model.lacks = lambda *_: False
        batch.leave(first)
        again = batch.join(request(1, length=200), conversation)
        ends = {}
        while batch.members:
            ends.update(batch.step())
    assert ends[again].token_ids == engine.complete(request(1, length=200)).token_ids


@pytest.mark.parametrize(
    ("which", "work"),
    [
        ("target", "new_cache"),
        ("target", "prefill"),
        ("target", "verify"),
        ("draft", "prefill"),
        ("draft", "propose"),
    ],
)
def test_alone_it_fails_and_its_conversation_is_whole(new_engine, which, work):
    engine, asked = new_engine(), request(length=300)
    conversation, model = engine.open_conversation(), getattr(engine.pair, which)
    model.lacks = lambda name, _: name == work
    with pytest.raises(OutOfMemory):
        engine.complete(asked, None if work == "new_cache" else conversation)
    model.lacks = lambda *_: False
    assert engine.complete(asked, conversation).token_ids == engine.complete(asked).token_ids


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("which", "work"),
    [("target", "new_cache"), ("draft", "prefill"), ("draft", "propose"), ("target", "verify")],
)
def test_what_is_kept_of_past_texts_goes_before_anybody_waits_or_fails(new_engine, which, work, beside):
    engine, asked = new_engine(prefixes=PrefixCache(1_000_000)), request(1, length=40)
    wanted = new_engine().complete(asked).token_ids
    engine.complete(request(2))
    assert engine.prefix_cache_bytes
    model = getattr(engine.pair, which)
    with engine.batch() as batch:
        if beside:
            batch.join(request(3, max_tokens=60))
            [*batch.step()]
        model.lacks = lambda name, _: name == work and engine.prefix_cache_bytes > 0
        member = batch.join(asked)
        told = []
        while not member.over:
            told += [event for who, event in batch.step() if who is member]
    assert told[-1].token_ids == wanted


@pytest.mark.parametrize(("which", "work"), [("draft", "propose"), ("target", "verify")])
def test_what_is_kept_of_past_texts_goes_for_all_who_lack_memory_in_a_round(new_engine, which, work):
    engine, asked = new_engine(prefixes=PrefixCache(1_000_000)), [request(seed) for seed in range(3)]
    wanted = [new_engine().complete(one).token_ids for one in asked]
    engine.complete(request(9))
    with engine.batch() as batch:
        members = [batch.join(one) for one in asked]
        while any(member.reads for member in members):
            [*batch.step()]
        model = getattr(engine.pair, which)
        model.lacks = lambda name, _: name == work and engine.prefix_cache_bytes > 0
        assert [*batch.step()] == []
        assert not engine.prefix_cache_bytes
        ends = {}
        while batch.members:
            ends.update(batch.step())
    assert [ends[member].token_ids for member in members] == wanted


class Listener:
    """A recorder that remembers."""

    def __init__(self):
        self.heard = []

    def record(self, answered):
        self.heard.append(answered)


@pytest.mark.parametrize("work", ["propose", "verify"])
def test_of_a_round_only_who_has_no_memory_alone_fails(new_engine, work):
    recorder = Listener()
    engine = new_engine(recorder=recorder)
    model = engine.pair.draft if work == "propose" else engine.pair.target
    kept = Provenance("jokes", "generate")
    with engine.batch() as batch:
        members = [batch.join(request(seed, max_tokens=30, provenance=kept)) for seed in range(4)]
        said = 0
        while said < 8:
            said += sum(isinstance(event, RoundDone) for _, event in batch.step())
        conversation = members[2].stream.conversation
        greedy_one = conversation.draft_cache if work == "propose" else conversation.target_cache
        model.lacks = lambda name, jobs: name == work and any(job.cache is greedy_one for job in jobs)
        told = [*batch.step()]
        failed = [(who, event.error) for who, event in told if isinstance(event, Failed)]
        assert [who for who, _ in failed] == [members[2]]
        assert isinstance(failed[0][1], OutOfMemory)
        assert [answered.finish_reason for answered in recorder.heard] == ["cancelled"]
        ends = {}
        while batch.members:
            ends.update(batch.step())
    assert len(ends) == 3
    for seed, member in enumerate(members):
        if seed != 2:
            assert ends[member].token_ids == engine.complete(request(seed, max_tokens=30)).token_ids
