"""MLX's shared arrays: a cache is its own, whoever it is computed with, and a step is one forward for all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.core as mx

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.backends.mlx import steps as steps_module
from draftloop.backends.mlx.backend import SWITCH, MlxBackend
from draftloop.errors import OutOfMemory
from draftloop.types import Rules, Sampling

GREEDY = Rules(Sampling())
SAMPLED = Rules(Sampling(temperature=0.9, top_p=0.9))
WARM = Rules(Sampling(temperature=3.0), masked_ids=(5,), masked_rows=1)
ROOM = 600


@pytest.fixture(scope="module")
def folder(toy_folder):
    return toy_folder()


@pytest.fixture(scope="module", params=["1", "0"], ids=["compiled", "anew"])
def model(request, folder):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(SWITCH, request.param)
        return MlxBackend("cpu").load(folder, max_kv_cache_tokens=ROOM)


@dataclass
class Text:
    """One cache and what it must hold."""

    cache: object
    tokens: list[int] = field(default_factory=list)

    def settle(self, tokens):
        self.tokens = list(tokens)
        self.cache.trim(self.cache.position - len(tokens))


def read(model, tokens):
    text = Text(model.new_cache(), list(tokens))
    if tokens:
        model.prefill([PrefillJob(text.cache, tokens)])
    return text


def some_tokens(seed, count):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def guesses(tokens):
    return Proposal(tuple(tokens), None, len(tokens)) if tokens else NO_PROPOSAL


def verify(model, texts, drafts, rules=None):
    """Their verdicts; each text is then what it was, with the last token and the drafts behind it."""
    zeros, halves = np.zeros(64, np.float32), np.full(64, 0.5, np.float32)
    jobs = [
        VerifyJob(text.cache, 7, guesses(own), rule, zeros[: len(own)], halves[: len(own) + 1])
        for text, own, rule in zip(texts, drafts, rules or [GREEDY] * len(texts), strict=True)
    ]
    verdicts = model.verify(jobs)
    for text, own in zip(texts, drafts, strict=True):
        text.tokens += [7, *own]
    return verdicts


def propose(model, texts, counts, unread, rules=None):
    """Drafts, which are forgotten again; the unread tokens stay."""
    jobs = [
        ProposeJob(text.cache, own, k, rule, np.full(k, 0.5, np.float32))
        for text, own, k, rule in zip(texts, unread, counts, rules or [GREEDY] * len(texts), strict=True)
    ]
    proposals = model.propose(jobs)
    for text, own in zip(texts, unread, strict=True):
        text.settle([*text.tokens, *own])
    return [np.array(one.tokens).tolist() for one in proposals]


def assert_holds(model, text):
    assert text.cache.position == len(text.tokens)
    expected = model.logits(read(model, text.tokens).cache, (3, 4))
    found = model.logits(text.cache, (3, 4))
    text.settle(text.tokens)
    np.testing.assert_allclose(found, expected, atol=2e-3)


steps = st.lists(
    st.tuples(
        st.sampled_from(("verify", "verify", "propose", "propose", "prefill", "paste", "anew")),
        st.sets(st.integers(0, 3), min_size=1),
        st.integers(0, 999),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.sampled_from((0, 1, 5, 40, 254)), min_size=4, max_size=4), script=steps)
def test_whatever_is_computed_together_each_cache_holds_its_own_text(model, lengths, script):
    """Of unequal positions and widths, joining, leaving, trimmed, and copied out of a batch."""
    texts = [read(model, some_tokens(seed, length)) for seed, length in enumerate(lengths)]
    for name, chosen, seed in script:
        random, who = np.random.default_rng(seed), [texts[index] for index in sorted(chosen)]
        widths = random.integers(0, 6, len(who)).tolist()
        if name == "verify":
            verify(model, who, [some_tokens(seed, width) for width in widths])
            for text in who:
                text.settle(text.tokens[: len(text.tokens) - int(random.integers(0, 2))])
        elif name == "propose":
            unread = [some_tokens(seed, 1 + width * (seed % 5)) for width in widths]
            propose(model, who, [1 + width for width in widths], unread)
        elif name == "prefill":
            who[0].tokens += some_tokens(seed, 9)
            model.prefill([PrefillJob(who[0].cache, who[0].tokens[-9:])])
        elif name == "paste" and who[-1].tokens:
            count = 1 + seed % len(who[-1].tokens)
            who[0].cache.paste(who[-1].cache.copy(count), count)
            who[0].tokens = who[-1].tokens[:count]
        elif name == "anew":
            texts[min(chosen)] = read(model, some_tokens(seed, 3))
    for text in texts:
        assert_holds(model, text)


def test_what_is_drafted_and_decided_is_what_it_is_alone(model):
    """By rules of their own, which make other neighbours in each step; the last tokens of the few count."""
    lengths, widths = (3, 60, 300, 17, 1, 8), (0, 4, 1, 2, 3, 0)
    unread = [some_tokens(length, 1 + length % 30) for length in lengths]
    drafting = (GREEDY, SAMPLED, WARM, GREEDY, SAMPLED, WARM)
    deciding = (WARM, GREEDY, WARM, WARM, SAMPLED, GREEDY)

    def made(indexes):
        texts = [read(model, some_tokens(i, lengths[i])) for i in indexes]
        own = [unread[i] for i in indexes]
        drafted = propose(model, texts, [1 + widths[i] for i in indexes], own, [drafting[i] for i in indexes])
        drafts = [some_tokens(i, widths[i]) for i in indexes]
        verdicts = verify(model, texts, drafts, [deciding[i] for i in indexes])
        return list(zip(drafted, verdicts, strict=True))

    together = made(range(6))
    for i in range(6):
        drafted, verdict = made([i])[0]
        assert together[i][0] == drafted
        assert together[i][1].tokens == verdict.tokens
        assert together[i][1].alphas == pytest.approx(verdict.alphas, abs=1e-4)


def test_a_step_is_one_forward_whoever_shares_it(folder, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    model, calls = MlxBackend("cpu").load(folder, max_kv_cache_tokens=ROOM), []
    attend = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda *arrays, **options: calls.append(arrays[0].shape[::2]) or attend(*arrays, **options),
    )
    texts = [read(model, some_tokens(seed, 4 + seed)) for seed in range(6)]
    calls.clear()
    verify(model, texts, [some_tokens(seed, seed) for seed in range(6)])
    assert calls == [(6, 6)] * 2
    calls.clear()
    propose(model, texts, [3, 1, 2, 3, 3, 3], [[5]] * 6)
    assert calls == [(6, 1)] * 6
    calls.clear()
    propose(model, texts, [1] * 6, [[5]] * 5 + [[5] * 40])
    assert sorted(calls) == [(1, 39)] * 2 + [(6, 1)] * 2


def test_who_finds_no_room_changes_nobody(model):
    texts = [read(model, some_tokens(seed, length)) for seed, length in ((0, 30), (1, ROOM - 2), (2, 5))]
    verify(model, texts, [[], [], []])
    with pytest.raises(ValueError, match=str(ROOM)):
        verify(model, texts, [[1, 2], [1, 2], []])
    for text in (texts[0], texts[2]):
        assert_holds(model, text)
    verify(model, [texts[0], texts[2]], [[1, 2], [3]])
    assert_holds(model, texts[0])


class Failing:
    """A processor that fails behind the first drafted token."""

    def bias(self, drafted):
        if drafted:
            raise RuntimeError("no bias")


def test_a_failure_in_the_middle_leaves_the_others_texts_as_they_were(model):
    texts = [read(model, some_tokens(seed, 10 * (seed + 1))) for seed in range(3)]
    wanted = [propose(model, [text], [4], [[9]]) for text in texts]
    for text in texts:
        text.settle(text.tokens[:-1])
    failing = [ProposeJob(texts[1].cache, [9], 4, Rules(Sampling(), processor=Failing()), np.zeros(4))]
    fine = [ProposeJob(text.cache, [9], 4, GREEDY, np.zeros(4)) for text in (texts[0], texts[2])]
    with pytest.raises(RuntimeError, match="no bias"):
        model.propose([fine[0], *failing, fine[1]])
    for text in texts:
        text.settle(text.tokens)
        assert_holds(model, text)
    assert propose(model, [texts[0], texts[2]], [4, 4], [[9], [9]]) == [wanted[0][0], wanted[2][0]]


def test_a_round_without_memory_may_be_taken_in_parts(model, monkeypatch):
    """The caches are trimmed to what they held, and then some of the rows are computed in the same arrays."""
    texts = [read(model, some_tokens(seed, 10 * (seed + 1))) for seed in range(5)]
    before = [list(text.tokens) for text in texts]
    drafts = [some_tokens(seed, seed) for seed in range(5)]
    wanted = verify(model, texts, drafts)
    for text, tokens in zip(texts, before, strict=True):
        text.settle(tokens)

    def without_memory(one, *others, real=np.array):
        if isinstance(one, mx.array):
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        return real(one, *others)

    with monkeypatch.context() as patched:
        patched.setattr(np, "array", without_memory)
        with pytest.raises(OutOfMemory):
            verify(model, texts, drafts)
    for text, tokens in zip(texts, before, strict=True):
        text.settle(tokens)
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        assert verify(model, texts[part], drafts[part]) == wanted[part]
    for text in texts:
        assert_holds(model, text)


def test_a_cache_that_left_soon_holds_nothing_of_the_others(model):
    texts = [read(model, some_tokens(seed, 400)) for seed in range(6)]
    verify(model, texts, [[]] * 6)
    before = mx.get_active_memory()
    for _ in range(40):
        verify(model, texts[1:], [[]] * 5)
    del texts[1:]
    kept = texts[0].cache.bytes_per_token * 512
    assert mx.get_active_memory() < before - 4 * kept
    assert_holds(model, texts[0])


def test_traces_that_were_forgotten_are_made_again(folder, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(steps_module, "MOST_TRACES", 2)
    model = MlxBackend("cpu").load(folder, max_kv_cache_tokens=ROOM)
    text, made, compile_one = read(model, some_tokens(0, 5)), [], mx.compile
    monkeypatch.setattr(mx, "compile", lambda function: made.append(1) or compile_one(function))
    for width, traces in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        verify(model, [text], [some_tokens(width, width)])
        assert len(made) == traces
    assert_holds(model, text)
