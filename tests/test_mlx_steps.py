"""MLX's compiled steps: the same answers as graphs built anew, one wait for the device a round."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.core as mx

from draftloop.backends.architecture import read_architecture
from draftloop.backends.base import PrefillJob, ProposeJob
from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec, new_lora
from draftloop.backends.mlx.backend import SWITCH, MlxBackend
from draftloop.speculation.round import decode, run_round
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import Rules, Sampling

PROMPT = tuple(np.random.default_rng(5).integers(0, 250, 20).tolist())
SAMPLED = Sampling(temperature=0.8, top_p=0.95, top_k=50, min_p=0.01)
SPEC = LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
WAITS = ("item", "tolist", "__int__", "__float__", "__bool__", "__index__")


def backend(compiled, monkeypatch):
    monkeypatch.setenv(SWITCH, "1" if compiled else "0")
    return MlxBackend("cpu")


def pair_of(backend, folders, room=400):
    target, draft = (backend.load(folder, max_kv_cache_tokens=room) for folder in folders)
    return Pair(target, draft)


@pytest.fixture(scope="module")
def folders(toy_pair):
    return toy_pair(noise=0.15)


@pytest.fixture
def pairs(folders, monkeypatch):
    """Compiled, and not."""
    return tuple(pair_of(backend(compiled, monkeypatch), folders) for compiled in (True, False))


def begun(pair, sampling, *, max_tokens=40, min_tokens=40, trace=False, k=4):
    settings = DecodeSettings(sampling, max_tokens, frozenset({271}), k, 7, min_tokens, trace)
    conversation = Conversation(pair)
    for _ in read_prompt(pair, conversation, PROMPT):
        pass
    return Stream(conversation, settings)


def answer(pair, sampling, **options):
    rounds = list(decode(pair, begun(pair, sampling, **options)))
    return [one.tokens for one in rounds], [one.accepted_tokens for one in rounds]


@contextmanager
def counted(monkeypatch):
    """Every way by which this program could wait for MLX's device."""
    waits = []

    def count(owner, name):
        real = getattr(owner, name)

        def counting(*args, **options):
            if owner is not np or any(isinstance(one, mx.array) for one in args):
                waits.append(name)
            return real(*args, **options)

        patched.setattr(owner, name, counting)

    with monkeypatch.context() as patched:
        for name in WAITS:
            count(mx.array, name)
        for name in ("eval", "synchronize"):
            count(mx, name)
        for name in ("array", "asarray"):
            count(np, name)
        yield waits


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_round_waits_once(folders, monkeypatch, compiled, sampling, k):
    pair = pair_of(backend(compiled, monkeypatch), folders)
    stream = begun(pair, sampling, trace=True, k=k)
    with counted(monkeypatch) as waits:
        for done in range(1, 4):
            run_round(pair, [stream])
            assert len(waits) == done


def test_every_way_of_waiting_is_counted(monkeypatch):
    array = mx.array([3])
    # Looked up when called, not before.
    ways = (
        lambda: array.item(),  # noqa: PLW0108
        lambda: int(array[0]),
        lambda: bool(array[0] > 1),
        lambda: float(array[0]),
        lambda: array.tolist(),  # noqa: PLW0108
        lambda: np.array(array),
        lambda: np.asarray(array),
        lambda: mx.eval(array),
    )
    with counted(monkeypatch) as waits:
        for done, wait in enumerate(ways, start=1):
            wait()
            assert len(waits) == done


@pytest.mark.parametrize(
    "sampling", [Sampling(), SAMPLED, Sampling(1.0)], ids=["greedy", "filtered", "plain"]
)
@pytest.mark.parametrize("trace", [False, True])
def test_answers_are_the_same_compiled_or_not(pairs, sampling, trace):
    compiled, plain = (answer(pair, sampling, trace=trace) for pair in pairs)
    assert compiled == plain
    assert 0 < sum(compiled[1]) < 4 * len(compiled[1])


def test_a_cache_that_grows_over_several_sizes(pairs):
    """256 tokens at a time: each size has traces of its own."""
    compiled, plain = (answer(pair, Sampling(), max_tokens=300, min_tokens=300) for pair in pairs)
    assert compiled == plain


def test_what_is_behind_the_text_does_not_count(pairs):
    """Trimmed tokens stay in the arrays, and so do those of a text that was pasted over."""
    for pair in pairs:
        cache = pair.target.new_cache()
        pair.target.prefill([PrefillJob(cache, PROMPT)])
        wanted = pair.target.logits(cache, [4, 5])
        copied = cache.copy(len(PROMPT))
        pair.target.logits(cache, [9, 9, 9, 9])
        cache.trim(6)
        assert np.allclose(pair.target.logits(cache, [4, 5]), wanted, atol=1e-4)
        cache.paste(copied, len(PROMPT))
        assert np.allclose(pair.target.logits(cache, [4, 5]), wanted, atol=1e-4)


def test_an_adapter_is_seen_by_steps_that_were_traced_before(pairs, folders):
    lora = new_lora(read_architecture(folders[1]), SPEC, 0)
    random = np.random.default_rng(0)
    modules = {
        name: LoraModule(one.a, random.standard_normal(one.b.shape).astype(np.float32))
        for name, one in lora.modules.items()
    }
    found = []
    for pair in pairs:
        bare = answer(pair, Sampling())
        pair.draft.set_adapter(Lora(SPEC, modules), AdapterForm.UNFUSED)
        found.append(answer(pair, Sampling()))
        assert found[-1] != bare
        pair.draft.set_adapter(None, AdapterForm.UNFUSED)
        assert answer(pair, Sampling()) == bare
    assert found[0] == found[1]


def test_another_thread_may_go_on_with_traced_steps(pairs):
    wanted = [answer(pair, SAMPLED) for pair in pairs]
    found = []
    thread = threading.Thread(target=lambda: found.extend(answer(pair, SAMPLED) for pair in pairs))
    thread.start()
    thread.join()
    assert found == wanted


def test_a_long_backlog_is_read_without_a_trace(pairs):
    """Its width does not come again."""
    tokens = []
    for pair in pairs:
        cache = pair.draft.new_cache()
        job = ProposeJob(cache, [7] * 150, 3, Rules(Sampling()), np.zeros(3, np.float32))
        tokens.append(np.array(pair.draft.propose([job])[0].tokens).tolist())
        assert cache.position == 152
    assert tokens[0] == tokens[1]


def test_the_device_says_which_it_is(monkeypatch):
    """Costs that were measured one way must not price the other."""
    on, off = (backend(compiled, monkeypatch).capabilities().device for compiled in (True, False))
    assert on == f"{off}, compiled steps"
