"""Adding an adapter to a 4-bit weight and rounding it back: the nearest that the search finds."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.backends.torch.linear import AffineWeight, dequantize, int8_linear, pack_codes, unpack_codes
from draftloop.backends.torch.requantize import shifted

GROUP = 32


def weight_of(codes, scales, biases, dtype):
    """codes [out, in]; scales and biases [out, in / 32]."""
    return AffineWeight(pack_codes(codes.to(torch.uint8)), scales.to(dtype), biases.to(dtype))


def random_weight(seed, dtype=torch.bfloat16, rows=4, groups=3):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups * GROUP), generator=random)
    scales, biases = torch.randn(2, rows, groups, generator=random)
    return weight_of(codes, scales * 0.01, biases * 0.1, dtype)


def error(found, wanted):
    """Squared, by group."""
    difference = dequantize(found, torch.float32) - wanted
    return difference.view(*found.scales.shape, -1).square().sum(dim=-1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_codes_are_packed_as_they_are_unpacked(seed):
    words = random_weight(seed).weight
    assert torch.equal(pack_codes(unpack_codes(words)), words)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_no_change_changes_no_bit(seed, dtype):
    weight = random_weight(seed, dtype)
    found = shifted(weight, torch.zeros(4, 3 * GROUP))
    assert torch.equal(dequantize(found, torch.float32), dequantize(weight, torch.float32))
    assert (found.scales.dtype, found.biases.dtype) == (dtype, dtype)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([1e-4, 3e-3, 0.03, 0.5]))
def test_the_error_is_that_of_four_bits(seed, size):
    """No group is farther off than its whole range in 15 steps, nor than if it had been left alone."""
    weight = random_weight(seed)
    delta = torch.randn(4, 3 * GROUP, generator=torch.Generator().manual_seed(seed + 1)) * size
    wanted = dequantize(weight, torch.float32) + delta
    grouped = wanted.view(4, 3, -1)
    step = (grouped.amax(dim=-1) - grouped.amin(dim=-1)) / 15
    # Half a step in each weight, and what bfloat16 takes from scale and bias.
    coarse = (grouped.abs().amax(dim=-1) + 15 * step) * 2**-8
    found = error(shifted(weight, delta), wanted)
    assert (found <= GROUP * (step / 2 + coarse) ** 2).all()
    assert (found <= error(weight, wanted) * (1 + 1e-5)).all()


def test_a_wider_range_gets_a_wider_scale():
    weight = random_weight(3)
    delta = torch.zeros(4, 3 * GROUP)
    delta[1, GROUP : 2 * GROUP] = torch.linspace(-2, 2, GROUP)
    found = shifted(weight, delta)
    assert found.scales[1, 1] > 0.2
    untouched = torch.ones(4, 3, dtype=torch.bool)
    untouched[1, 1] = False
    assert torch.equal(found.scales[untouched], weight.scales[untouched])


def test_a_group_of_equal_weights_can_be_shifted():
    weight = weight_of(torch.zeros(1, GROUP), torch.zeros(1, 1), torch.full((1, 1), 0.5), torch.bfloat16)
    found = dequantize(shifted(weight, torch.full((1, GROUP), 0.25)), torch.float32)
    assert torch.equal(found, torch.full((1, GROUP), 0.75))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.sampled_from([3, 16, 33]), count=st.sampled_from([1, 2, 5]))
def test_eight_bits_are_near(seed, rows, count):
    random = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, 64, generator=random), torch.randn(count, 64, generator=random)
    weight[0] = 0
    bias = torch.randn(rows, generator=random)
    linear = int8_linear(weight, bias, torch.float32)
    # The whole range is used, and no weight is farther off than half a step.
    assert (linear.codes[1:rows].abs().amax(dim=1) == 127).all()
    dense = (linear.codes * linear.scales.unsqueeze(1))[:rows]
    assert ((dense - weight).abs() <= linear.scales[:rows, None] * 0.5001).all()
    found = linear(x)
    assert found.shape == (count, rows)
    torch.testing.assert_close(found, x @ dense.T + bias, rtol=0, atol=1e-4)
