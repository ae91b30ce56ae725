"""A trainer's step, its state, and whether the draft learns. Its loss and gradient: test_objectives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from examples import (
    ALL_MODULES,
    GREEDY,
    NUCLEUS,
    PLAIN,
    SPEC,
    one_of_each,
    open_trainer,
    random_lora,
    random_prompt,
    shuffled,
    written_by,
)

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec, adapted_modules, new_lora
from draftloop.backends.training import Objective, TrainerSettings
from draftloop.errors import BackendUnavailable, ModelUnreadable

PLAN = TrainerSettings(Objective.LK_HYBRID, gradient_checkpointing=False)
UNCUT = replace(PLAN, max_gradient_norm=1e9)
RATE = 1e-3


def test_a_backend_that_does_not_train_says_so(backend, toy_folder):
    folder = toy_folder()
    lora = random_lora(read_architecture(folder))
    if backend.capabilities().backend != "numpy":
        assert backend.new_trainer(folder, lora, PLAN).state().steps == 0
        return
    with pytest.raises(BackendUnavailable, match="does not train") as caught:
        backend.new_trainer(folder, lora, PLAN)
    assert "backend: torch" in caught.value.remedy


@pytest.fixture(scope="session")
def examples(reference, load_pair):
    """One text of the toy target for each kind of rules."""
    return one_of_each(load_pair(reference).target)


@pytest.fixture(scope="session")
def draft_folder(toy_pair):
    """`draft_folder(**options)`: the draft of a toy pair."""
    return lambda **options: toy_pair(**options)[1]


@pytest.fixture
def trainer(backend, draft_folder):
    """`trainer(plan, spec, lora, folder, **options)`: a new one, on a toy draft and with an adapter that acts
    where nothing else is said.
    """

    def make(plan=PLAN, spec=SPEC, lora=None, folder=None, **options):
        folder = folder or draft_folder(**options)
        start = random_lora(read_architecture(folder), spec, gain=0.2) if lora is None else lora
        return open_trainer(backend, folder, start, plan)

    return make


def weights_of(state):
    return {f"{n}.{p}": getattr(m, p) for n, m in state.lora.modules.items() for p in ("a", "b")}


def assert_same_arrays(found, expected, relative=0.0):
    """By name; `relative` is over each array's largest value."""
    assert list(found) == list(expected)
    for name, array in found.items():
        assert array.dtype == np.float32, name
        allowed = relative * np.abs(expected[name]).max() if relative else 0.0
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=allowed, err_msg=name)


def assert_same_state(found, expected, relative=0.0):
    assert found.steps == expected.steps
    assert found.lora.spec == expected.lora.spec
    assert_same_arrays(weights_of(found), weights_of(expected), relative)
    assert_same_arrays(dict(found.moments), dict(expected.moments), relative)


class TestState:
    """What a trainer gives away and takes back."""

    def test_it_begins_with_what_it_was_given(self, trainer, draft_folder):
        lora = random_lora(read_architecture(draft_folder()), seed=9)
        state = trainer(lora=lora).state()
        assert state.steps == 0
        assert state.lora.spec == lora.spec
        assert list(state.lora.modules) == list(lora.modules)
        for name, module in lora.modules.items():
            np.testing.assert_array_equal(state.lora.modules[name].a, module.a)
            np.testing.assert_array_equal(state.lora.modules[name].b, module.b)
        shapes = {name: array.shape for name, array in weights_of(state).items()}
        expected = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in ("m", "v")}
        assert {name: array.shape for name, array in state.moments.items()} == expected
        assert not any(array.any() for array in state.moments.values())

    def test_a_state_is_a_copy(self, trainer, examples):
        one = trainer()
        one.step([examples], RATE)
        state = one.state()
        held = {name: array.copy() for name, array in {**weights_of(state), **state.moments}.items()}
        one.step([examples], RATE)
        for name, array in {**weights_of(state), **state.moments}.items():
            np.testing.assert_array_equal(array, held[name])
        one.restore(state)
        after = one.state()
        one.step([examples], RATE)
        assert_same_state(after, state)
        for name, array in {**weights_of(state), **state.moments}.items():
            np.testing.assert_array_equal(array, held[name])

    def test_a_restored_run_goes_on_as_if_nothing_had_been(self, trainer, examples):
        whole = trainer()
        for turn in range(2):
            whole.step([examples], RATE * (turn + 1))
        state = whole.state()
        resumed = trainer(lora=ones_like(state.lora))
        resumed.step([examples[:1]], 0.1)
        resumed.restore(state)
        assert_same_state(resumed.state(), state)
        for turn in range(2):
            results = [one.step([examples[turn:]], RATE) for one in (whole, resumed)]
            assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
        assert whole.state().steps == 4
        assert_same_state(resumed.state(), whole.state(), 1e-6)

    @pytest.mark.parametrize("target_modules", [("v_proj",), ("q_proj", "down_proj"), ALL_MODULES])
    def test_only_the_target_modules_are_trained(self, trainer, draft_folder, examples, target_modules):
        architecture = read_architecture(draft_folder())
        one = trainer(spec=replace(SPEC, target_modules=target_modules))
        before = weights_of(one.state())
        one.step([examples], RATE)
        after = one.state()
        assert list(after.lora.modules) == [name for name, _ in adapted_modules(architecture, target_modules)]
        for name, array in weights_of(after).items():
            assert (array != before[name]).any(), name

    def test_the_start_of_a_fresh_adapter(self, trainer, draft_folder, examples):
        """B is zero, so A has no gradient yet, and does not move."""
        one = trainer(lora=new_lora(read_architecture(draft_folder()), SPEC, seed=0))
        before = weights_of(one.state())
        assert one.step([examples], RATE).gradient_norm > 0
        for name, array in weights_of(one.state()).items():
            if name.endswith(".a"):
                np.testing.assert_array_equal(array, before[name])
            else:
                assert array.any(), name


def ones_like(lora):
    return Lora(lora.spec, {n: LoraModule(m.a * 0 + 1, m.b * 0 + 1) for n, m in lora.modules.items()})


def with_infinity(lora):
    name, module = list(lora.modules.items())[3]
    b = module.b.copy()
    b[0, 0] = np.inf
    return Lora(lora.spec, {**lora.modules, name: LoraModule(module.a, b)})


class TestStep:
    """One optimizer step."""

    def test_it_is_adam(self, trainer, examples):
        """Kingma and Ba 2015, Algorithm 1, from the gradient that the first moment tells; three steps."""
        one = trainer(UNCUT)
        state = one.state()
        for turn, rate in enumerate((1e-3, 3e-3, 5e-4), 1):
            before, moments = weights_of(state), state.moments
            result = one.step([examples[turn - 1 :]], rate)
            state = one.state()
            assert result.applied
            assert state.steps == turn
            for name, array in weights_of(state).items():
                gradient = (state.moments[f"{name}.m"].astype(np.float64) - 0.9 * moments[f"{name}.m"]) / 0.1
                v = 0.999 * moments[f"{name}.v"].astype(np.float64) + 0.001 * gradient**2
                top = np.abs(gradient).max()
                np.testing.assert_allclose(state.moments[f"{name}.v"], v, rtol=1e-3, atol=1e-9 * top**2)
                m = state.moments[f"{name}.m"].astype(np.float64) / (1 - 0.9**turn)
                v = state.moments[f"{name}.v"].astype(np.float64) / (1 - 0.999**turn)
                expected = before[name] - rate * m / (np.sqrt(v) + 1e-8)
                np.testing.assert_allclose(array, expected, atol=2e-3 * rate)

    @pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (2, 3), (1,)], ids=str)
    def test_microbatches_add_up(self, trainer, examples, cuts):
        """All rows weigh the same, wherever a batch is cut; its padding weighs nothing."""
        whole, parts = trainer(), trainer()
        pieces = [
            examples[start:stop] for start, stop in zip((0, *cuts), (*cuts, len(examples)), strict=True)
        ]
        expected, found = whole.step([examples], RATE), parts.step(pieces, RATE)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
        assert (found.rows, found.tokens) == (expected.rows, expected.tokens)
        assert_same_arrays(dict(parts.state().moments), dict(whole.state().moments), 1e-3)

    @pytest.mark.parametrize(
        "options", [{}, {"quantized": True, "model_type": "qwen2"}], ids=["dense", "packed"]
    )
    def test_checkpointing_changes_nothing(self, trainer, examples, options):
        plain, frugal = (
            trainer(replace(UNCUT, gradient_checkpointing=frugal), **options) for frugal in (False, True)
        )
        expected, found = plain.step([examples], RATE), frugal.step([examples], RATE)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert_same_arrays(dict(frugal.state().moments), dict(plain.state().moments), 1e-3)

    @pytest.mark.parametrize("share", [0.5, 0.01])
    def test_long_gradients_are_cut(self, trainer, examples, share):
        """To the length that the settings allow; what is reported is the length before."""
        uncut = trainer(UNCUT)
        norm = uncut.step([examples], RATE).gradient_norm
        one = trainer(replace(PLAN, max_gradient_norm=norm * share))
        assert one.step([examples], RATE).gradient_norm == pytest.approx(norm, rel=1e-4)
        expected = {n: a * share ** (1 + n.endswith(".v")) for n, a in uncut.state().moments.items()}
        assert_same_arrays(dict(one.state().moments), expected, 1e-3)

    def test_short_gradients_are_not(self, trainer, examples):
        uncut, one = trainer(UNCUT), trainer(PLAN)
        norm = uncut.step([examples], RATE).gradient_norm
        one = trainer(replace(PLAN, max_gradient_norm=norm * 1.01))
        one.step([examples], RATE)
        assert_same_state(one.state(), uncut.state(), 1e-6)

    def test_alpha_over_rank_is_the_scale(self, trainer, examples):
        """Twice the alpha and half of B is the same draft, with twice the gradient for B."""
        one = trainer(UNCUT)
        lora = one.state().lora
        halves = {n: LoraModule(m.a, m.b / 2) for n, m in lora.modules.items()}
        doubled = trainer(UNCUT, lora=Lora(replace(SPEC, alpha=2 * SPEC.alpha), halves))
        assert doubled.step([examples], RATE).loss == pytest.approx(one.step([examples], RATE).loss, rel=1e-5)
        expected = {n: a * 2 if n.endswith(".b.m") else a for n, a in one.state().moments.items()}
        kept = [n for n in expected if n.endswith(".m")]
        found = doubled.state().moments
        assert_same_arrays({n: found[n] for n in kept}, {n: expected[n] for n in kept}, 1e-3)

    @pytest.mark.parametrize("fault", ["a weight", "an example", "the last microbatch"])
    def test_a_step_without_a_finite_gradient_is_skipped(self, trainer, examples, fault):
        one = trainer()
        one.step([examples], RATE)
        good = one.state()
        broken = replace(examples[1], top_probs=np.full_like(examples[1].top_probs, np.nan))
        batches = {
            "a weight": [examples],
            "an example": [[examples[0], broken, examples[2]]],
            "the last microbatch": [[examples[0]], [examples[2]], [broken]],
        }
        if fault == "a weight":
            one.restore(replace(good, lora=with_infinity(good.lora)))
        before = one.state()
        result = one.step(batches[fault], RATE)
        assert not result.applied
        assert not np.isfinite(result.gradient_norm)
        assert_same_state(one.state(), before)
        # And it goes on as if the step had never been.
        one.restore(good)
        other = trainer()
        other.restore(good)
        assert one.step([examples], RATE).applied
        other.step([examples], RATE)
        assert_same_state(one.state(), other.state(), 1e-6)

    def test_an_adapter_that_does_not_fit_is_refused(self, trainer, draft_folder):
        small = read_architecture(draft_folder())
        wide = read_architecture(draft_folder(hidden_size=128, head_dim=16))
        with pytest.raises(ModelUnreadable) as caught:
            trainer(lora=random_lora(wide))
        assert caught.value.remedy.endswith(".")
        lora = random_lora(small)
        beyond = {**lora.modules, "model.layers.2.self_attn.v_proj": next(iter(lora.modules.values()))}
        with pytest.raises(ModelUnreadable):
            trainer(lora=Lora(lora.spec, beyond))

    def test_a_damaged_folder_is_refused(self, trainer, draft_folder, tmp_path):
        lora = random_lora(read_architecture(draft_folder()))
        (tmp_path / "config.json").write_bytes((draft_folder() / "config.json").read_bytes())
        with pytest.raises(ModelUnreadable):
            trainer(lora=lora, folder=tmp_path)


class TestReplay:
    """A trainer measures by the same rule as a served model."""

    @pytest.mark.parametrize("options", [{}, {"quantized": True}], ids=["dense", "packed"])
    def test_it_equals_the_models(self, trainer, backend, draft_folder, examples, options, rounding):
        one = trainer(**options)
        model = backend.load(draft_folder(**options), max_kv_cache_tokens=64)
        atol = rounding(1e-2 if options else 1e-3, 0.1, **options)
        for _ in range(2):
            model.set_adapter(one.state().lora, AdapterForm.UNFUSED)
            found, expected = one.replay(examples), model.replay(examples)
            for mine, theirs, example in zip(found, expected, examples, strict=True):
                assert mine.shape == (example.num_rows,)
                assert mine.dtype == np.float32
                np.testing.assert_allclose(mine, theirs, atol=atol)
            # With the weights as they are now, that is, behind a step that moves them far.
            one.step([examples], 0.05)

    def test_it_is_by_the_restored_weights(self, trainer, examples):
        """Right behind `restore`, before any step: a resumed run may begin with measuring."""
        one, other = trainer(), trainer()
        for _ in range(2):
            one.step([examples], 0.05)
        expected, before = (np.concatenate(t.replay(examples)) for t in (one, other))
        assert np.abs(expected - before).max() > 0.05
        other.restore(one.state())
        np.testing.assert_allclose(np.concatenate(other.replay(examples)), expected, atol=1e-5)

    def test_it_changes_nothing(self, trainer, examples):
        one, other = trainer(), trainer()
        for trained in (one, other):
            trained.step([examples], RATE)
        one.replay(examples)
        for trained in (one, other):
            trained.step([examples], RATE)
        assert_same_state(one.state(), other.state(), 1e-6)


SMALL = {
    "vocab_size": 64,
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
}
TAUGHT = LoraSpec(rank=4, alpha=8.0, target_modules=("v_proj", "down_proj"))
STEPS, PEAK_RATE = 30, 1e-2


@pytest.fixture(scope="session")
def lessons(reference, load_toy):
    """16 texts to learn from and 12 others to be measured on: greedy, filtered, plain.

    Their target is the draft with an adapter that the trainer does not know: something that can be learnt.
    """
    target, rules = load_toy(reference, **SMALL), (GREEDY, NUCLEUS, PLAIN)
    hidden = random_lora(target.architecture, replace(TAUGHT, rank=2, alpha=4.0), seed=9)
    target.set_adapter(hidden, AdapterForm.UNFUSED)
    prompts = [random_prompt(100 + i, 4, SMALL["vocab_size"]) for i in range(28)]
    written = [written_by(target, prompt, rules[i % 3], 20, seed=i) for i, prompt in enumerate(prompts)]
    return written[:16], written[16:]


@pytest.fixture
def taught(trainer, lessons, toy_folder):
    """`taught(objective, examples)`: held-out alpha before and after a short training."""

    def train(objective, examples):
        folder = toy_folder(**SMALL)
        lora = new_lora(read_architecture(folder), TAUGHT, seed=0)
        one = trainer(replace(PLAN, objective=objective), lora=lora, folder=folder)
        before = float(np.concatenate(one.replay(lessons[1])).mean())
        order = np.random.default_rng(0)
        for turn in range(STEPS):
            batch = [examples[i] for i in order.permutation(len(examples))[:4]]
            assert one.step([batch], PEAK_RATE * min(1, (turn + 1) / 5, (STEPS - turn) / 10)).applied
        return before, float(np.concatenate(one.replay(lessons[1])).mean())

    return train


@pytest.mark.parametrize("objective", Objective)
def test_a_draft_learns_what_its_target_says(taught, lessons, objective):
    before, after = taught(objective, lessons[0])
    assert after > before + 0.05


@pytest.mark.parametrize("objective", [Objective.LK_HYBRID, Objective.FORWARD_KL])
def test_a_draft_learns_nothing_from_shuffled_rows(taught, lessons, objective):
    """The negative control: training by itself does not raise held-out alpha."""
    before, after = taught(objective, [shuffled(one, seed) for seed, one in enumerate(lessons[0])])
    assert after < before - 0.05
