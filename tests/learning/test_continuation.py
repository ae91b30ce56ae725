"""A second training begins where the first one ended, whatever shape it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import Lora, LoraModule, LoraSpec, new_lora
from draftloop.learning.continuation import dropped_modules, starting_point

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.backends.architecture import Architecture

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
specs = st.builds(
    LoraSpec,
    rank=st.integers(1, 12),
    alpha=st.floats(0.5, 64),
    target_modules=st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(tuple),
)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory) -> Architecture:
    folder: Path = tmp_path_factory.mktemp("toy")
    return read_architecture(toys.write_toy_folder(folder, hidden_size=32, intermediate_size=48))


def learnt(architecture: Architecture, spec: LoraSpec, seed: int) -> Lora:
    random = np.random.default_rng(seed)
    fresh = new_lora(architecture, spec, seed)
    return Lora(
        spec,
        {
            name: LoraModule(module.a, random.standard_normal(module.b.shape).astype(np.float32))
            for name, module in fresh.modules.items()
        },
    )


def update(lora: Lora, name: str) -> np.ndarray:
    module = lora.modules[name]
    return lora.spec.scale * (module.b.astype(np.float64) @ module.a.astype(np.float64))


@settings(max_examples=60, deadline=None)
@given(old=specs, new=specs, seed=st.integers(0, 9))
def test_the_start_computes_what_was_learnt(architecture, old, new, seed):
    active = learnt(architecture, old, seed)
    start = starting_point(architecture, new, active, seed + 1)
    assert start.spec == new
    assert start.modules.keys() == new_lora(architecture, new, 0).modules.keys()
    for name, module in start.modules.items():
        assert module.a.shape[0] == module.b.shape[1] == new.rank
        assert module.a.dtype == module.b.dtype == np.float32
        if name not in active.modules:
            assert not module.b.any()
            continue
        before, after = update(active, name), update(start, name)
        if new.rank >= old.rank:
            np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
        else:
            # The best that so few ranks can do: what is lost is what the smaller singular values held.
            lost = np.linalg.svd(before, compute_uv=False)[new.rank :]
            error = np.linalg.norm(after - before)
            assert error == pytest.approx(np.linalg.norm(lost), rel=1e-3, abs=1e-3)


def test_new_ranks_can_learn(architecture):
    """Rows of A that are new are not zero: a zero A under a zero B would never move."""
    active = learnt(architecture, LoraSpec(2, 4.0, ("q_proj",)), 0)
    start = starting_point(architecture, LoraSpec(5, 4.0, ("q_proj",)), active, 1)
    for module in start.modules.values():
        assert (np.abs(module.a).sum(axis=1) > 0).all()
        assert not module.b[:, 2:].any()


def test_without_an_adapter_it_is_fresh(architecture):
    spec = LoraSpec(3, 6.0, ("v_proj", "up_proj"))
    start, fresh = starting_point(architecture, spec, None, 5), new_lora(architecture, spec, 5)
    for name, module in fresh.modules.items():
        np.testing.assert_array_equal(start.modules[name].a, module.a)
        np.testing.assert_array_equal(start.modules[name].b, module.b)


def test_the_same_shape_goes_on_to_the_bit(architecture):
    spec = LoraSpec(3, 6.0, ("v_proj", "up_proj"))
    active = learnt(architecture, spec, 2)
    start = starting_point(architecture, spec, active, 9)
    for name, module in active.modules.items():
        np.testing.assert_array_equal(start.modules[name].a, module.a)
        np.testing.assert_array_equal(start.modules[name].b, module.b)


def test_what_is_given_up_is_named(architecture):
    active = learnt(architecture, LoraSpec(2, 4.0, ("q_proj", "down_proj", "v_proj")), 0)
    assert dropped_modules(LoraSpec(2, 4.0, ("v_proj",)), active) == ("down_proj", "q_proj")
    assert dropped_modules(LoraSpec(2, 4.0, KINDS), active) == ()
    assert dropped_modules(LoraSpec(2, 4.0, ("v_proj",)), None) == ()
