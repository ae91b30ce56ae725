"""A draft whose head is cut: only the kept tokens are proposed, and nobody outside sees columns."""

from __future__ import annotations

import numpy as np
import pytest
from examples import RULES, one_of_each, random_lora, random_prompt, rounds_of, tokens_of

from draftloop.backends.base import ProposeJob
from draftloop.backends.lora import AdapterForm
from draftloop.backends.numpy.replay import alpha_rows
from draftloop.backends.vocabulary import CutVocabulary
from draftloop.speculation.stream import DecodeSettings, Pair
from draftloop.types import Rules, Sampling

VOCABULARY = 272
KEPT = np.sort(np.random.default_rng(5).choice(VOCABULARY, 90, replace=False)).astype(np.int32)
CUT = CutVocabulary(KEPT)
OTHERS = np.setdiff1d(np.arange(VOCABULARY), KEPT)
PROMPT = random_prompt(4, 12)
FOLDERS = [
    {"tied": tied, "quantized": quantized, "model_type": "qwen2"}
    for tied in (False, True)
    for quantized in (False, True)
]


def name_of(options):
    return "-".join(name for name, value in options.items() if value is True) or "plain"


def load(backend, folder, vocabulary=CUT):
    return backend.load(folder, max_kv_cache_tokens=128, vocabulary=vocabulary)


def logits(model):
    return model.logits(model.new_cache(), PROMPT)


def proposals(model, rules, k=5, seeds=range(6), text=()):
    """Tokens [n, K] and q [n, K, V] or None, on the host."""
    numbers = [np.random.default_rng(seed).random(k, dtype=np.float32) for seed in seeds]
    jobs = [ProposeJob(model.new_cache(), PROMPT, k, rules, one, text) for one in numbers]
    found = model.propose(jobs)
    tokens = np.array([[int(token) for token in one.tokens] for one in found])
    return tokens, None if found[0].q is None else np.array([host(one.q) for one in found])


def host(q):
    return q.cpu().numpy() if hasattr(q, "cpu") else np.array(q)


@pytest.mark.parametrize("options", FOLDERS, ids=name_of)
def test_kept_tokens_have_their_logits_and_others_none(backend, toy_folder, rounding, options):
    folder = toy_folder(**options)
    whole, cut = (logits(load(backend, folder, vocabulary)) for vocabulary in (None, CUT))
    assert cut.shape == whole.shape
    np.testing.assert_allclose(cut[:, KEPT], whole[:, KEPT], atol=rounding(1e-4, 0.1, **options))
    assert np.isneginf(cut[:, OTHERS]).all()


@pytest.mark.parametrize("name", RULES)
def test_proposals_equal_the_references(backend, reference, toy_pair, name):
    """The reference computes every logit and drops those that were cut: it has no map to forget."""
    rules = RULES[name]
    (tokens, q), (expected, expected_q) = (
        proposals(load(one, toy_pair()[1]), rules) for one in (backend, reference)
    )
    np.testing.assert_array_equal(tokens, expected)
    assert np.isin(tokens, KEPT).all()
    assert len(np.unique(tokens)) > 3
    if not rules.sampling.greedy:
        np.testing.assert_allclose(q, expected_q, atol=1e-4)
        assert not q[..., OTHERS].any()
        np.testing.assert_allclose(q.sum(axis=-1), 1, atol=1e-4)


class TestTheTextsOwnTokens:
    """An answer repeats what was asked: what stands in the text is proposed though it was cut off."""

    @pytest.fixture(autouse=True)
    def _follows(self, backend):
        if not backend.capabilities().drafts_from_text:
            pytest.skip("a head of fixed rows")

    @pytest.mark.parametrize("name", RULES)
    def test_proposals_equal_the_references(self, backend, reference, toy_pair, name):
        rules, text = RULES[name], [*PROMPT, *OTHERS[::3].tolist()]
        (tokens, q), (expected, expected_q) = (
            proposals(load(one, toy_pair()[1]), rules, text=text) for one in (backend, reference)
        )
        np.testing.assert_array_equal(tokens, expected)
        assert np.isin(tokens, [*KEPT, *text]).all()
        if not rules.sampling.greedy:
            assert not np.isin(tokens, KEPT).all()
            np.testing.assert_allclose(q, expected_q, atol=1e-4)

    def test_each_text_has_its_own(self, backend, toy_folder):
        model = load(backend, toy_folder())
        before, _ = proposals(model, RULES["plain"])
        widened, _ = proposals(model, RULES["plain"], text=OTHERS[:60].tolist())
        assert np.isin(widened, OTHERS[:60]).any()
        again, _ = proposals(model, RULES["plain"])
        np.testing.assert_array_equal(again, before)
        assert np.isneginf(logits(model)[:, OTHERS]).all()

    def test_ids_of_the_other_models_padding_are_left_out(self, backend, toy_folder):
        tokens, _ = proposals(load(backend, toy_folder()), RULES["plain"], text=[VOCABULARY, 9999])
        assert np.isin(tokens, KEPT).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5)], ids=["greedy", "sampled"])
def test_masked_tokens_are_held_back(backend, toy_folder, sampling):
    """What ends an answer is masked by its id, wherever it stands among the kept ones."""
    model = load(backend, toy_folder())
    free, _ = proposals(model, Rules(sampling))
    masked = tuple(np.unique(free[:, :3]).tolist())
    held, _ = proposals(model, Rules(sampling, masked_ids=(*masked, int(OTHERS[0])), masked_rows=3))
    assert not np.isin(held[:, :3], masked).any()


def test_greedy_answers_are_the_targets_own(backend, load_pair):
    pair = load_pair(backend, CUT)
    settings = DecodeSettings(Sampling(), 24, frozenset(), 4, 0)
    accepted = drafted = cut_off = 0
    for seed in range(4):
        prompt = random_prompt(seed, 9)
        rounds = rounds_of(pair, prompt, settings)
        assert tokens_of(rounds) == tokens_of(rounds_of(Pair(pair.target, None), prompt, settings))
        accepted += sum(one.accepted_tokens for one in rounds)
        drafted += sum(one.drafted_tokens for one in rounds)
        cut_off += int(np.isin(tokens_of(rounds), OTHERS).sum())
    assert 0 < accepted < drafted
    assert cut_off


def test_sampled_answers_equal_the_references(backend, reference, load_pair):
    if not backend.capabilities().drafts_from_text:
        pytest.skip("the reference drafts from the text too")
    found, expected = (load_pair(one, CUT) for one in (backend, reference))
    for seed in range(4):
        settings = DecodeSettings(Sampling(temperature=1.0, top_p=0.95), 16, frozenset(), 4, seed)
        told = [tokens_of(rounds_of(pair, PROMPT, settings)) for pair in (found, expected)]
        assert told[0] == told[1]


@pytest.mark.parametrize("name", RULES)
def test_replay_sees_the_draft_as_it_is_cut(backend, reference, load_pair, name):
    """Row by row as it would have proposed there: by the cut, and what the text held until then."""
    example = one_of_each(load_pair(reference).target)[list(RULES).index(name)]
    cut = load_pair(backend, CUT).draft.replay([example])[0]
    whole, first = load_pair(reference).draft, example.num_prompt_tokens
    rows = whole.logits(whole.new_cache(), example.tokens[:-1].tolist())[first - 1 :]
    expected = rows.copy()
    for index, row in enumerate(expected):
        text = example.tokens[: first + index] if backend.capabilities().drafts_from_text else []
        row[np.setdiff1d(OTHERS, text)] = -np.inf
    np.testing.assert_allclose(cut, alpha_rows(expected, example), atol=1e-3)
    assert cut.mean() < alpha_rows(rows, example).mean()


@pytest.mark.parametrize("form", AdapterForm)
def test_an_adapter_leaves_the_cut_alone(backend, toy_folder, form):
    """Every form the backend has, on and off again: the head stays what it was."""
    model = load(backend, toy_folder(model_type="qwen2", quantized=True))
    if form not in model.adapter_forms:
        pytest.skip(f"{form} is not among this backend's forms")
    before = logits(model)
    model.set_adapter(random_lora(model.architecture), form)
    worn = logits(model)
    assert np.isneginf(worn[:, OTHERS]).all()
    assert np.isfinite(worn[:, KEPT]).all()
    assert not np.allclose(worn[:, KEPT], before[:, KEPT], atol=0.01)
    model.set_adapter(None, AdapterForm.UNFUSED)
    np.testing.assert_array_equal(logits(model), before)


def test_a_text_may_hold_what_was_cut_off(backend, toy_folder):
    folder = toy_folder()
    prompt = OTHERS[:9].tolist()
    whole, cut = (load(backend, folder, vocabulary) for vocabulary in (None, CUT))
    np.testing.assert_allclose(
        cut.logits(cut.new_cache(), prompt)[:, KEPT],
        whole.logits(whole.new_cache(), prompt)[:, KEPT],
        atol=1e-4,
    )


def test_ids_that_the_model_has_not_are_refused(backend, toy_folder):
    vocabulary = CutVocabulary(np.array([3, VOCABULARY], np.int32))
    with pytest.raises(ValueError, match="272 is cut out of a vocabulary of 272"):
        load(backend, toy_folder(), vocabulary)
