"""The 4-bit form: bit layout, exact re-encoding of affine GGUF types, and the fit of all others."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from draftloop.models import affine
from models_samples import decode, q4_k_blocks


def relative_error(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def round_to_nearest(weights):
    """Plain min/max quantization in full precision: what the fit must not be worse than."""
    groups = weights.reshape(-1, affine.GROUP_SIZE)
    low = groups.min(axis=1, keepdims=True)
    scale = np.maximum((groups.max(axis=1, keepdims=True) - low) / affine.MAX_CODE, 1e-30)
    return (np.rint((groups - low) / scale) * scale + low).reshape(weights.shape)


def quantized(kind, rng, rows=24, width=512):
    if kind == "Q4_K":
        return q4_k_blocks(rng, rows, width)
    return gguf.quantize(
        rng.normal(0, 0.05, (rows, width)).astype(np.float32), gguf.GGMLQuantizationType[kind]
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_affine_types_lose_only_the_rounding_of_scale_and_bias(kind):
    blocks = quantized(kind, np.random.default_rng(1))
    wanted = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert relative_error(decode(affine.encode_blocks(blocks, kind)), wanted) < 0.01


@pytest.mark.parametrize("kind", ["Q5_0", "Q8_0", "F16", "F32", "BF16"])
def test_other_types_are_fitted_better_than_round_to_nearest(kind):
    blocks = quantized(kind, np.random.default_rng(2))
    wanted = affine.dequantize_blocks(blocks.view(np.uint8), kind)
    error = relative_error(decode(affine.encode_blocks(blocks.view(np.uint8), kind)), wanted)
    assert error < 0.99 * relative_error(round_to_nearest(wanted), wanted)


def test_code_i_of_a_word_sits_in_bits_4i():
    weights = np.tile(np.arange(16, dtype=np.float32), 4).reshape(1, 64)
    rows = affine.encode_dense(weights)
    assert rows.weight.dtype == np.uint32
    assert [(int(rows.weight[0, 0]) >> (4 * i)) & 15 for i in range(8)] == list(range(8))
    assert [(int(rows.weight[0, 1]) >> (4 * i)) & 15 for i in range(8)] == list(range(8, 16))
    np.testing.assert_array_equal(decode(rows), weights)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([32, 64, 96])),
        elements=st.floats(-100, 100, width=32),
    )
)
def test_every_weight_is_within_its_groups_range_and_error(weights):
    rows = affine.encode_dense(weights)
    groups = weights.reshape(-1, 32)
    span = groups.max(axis=1) - groups.min(axis=1)
    largest = np.abs(groups).max(axis=1)
    error = np.sqrt(np.square(decode(rows).reshape(-1, 32) - groups).mean(axis=1))
    # Half a step of 15, and bfloat16's 8 bits on scale and bias.
    assert (error <= span / 30 + largest * 2**-7 + 1e-30).all()


def test_a_group_of_equal_weights_is_kept():
    weights = np.full((2, 32), 0.5, np.float32)
    np.testing.assert_array_equal(decode(affine.encode_dense(weights)), weights)


def test_infinite_scales_show_in_the_result():
    blocks = quantized("Q4_0", np.random.default_rng(3)).copy()
    blocks[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    assert not np.isfinite(affine.encode_blocks(blocks, "Q4_0").scales.astype(np.float32)).all()


def test_mlx_reads_the_same_numbers():
    mx = pytest.importorskip("mlx.core")
    weights = np.random.default_rng(4).normal(0, 1, (16, 64)).astype(np.float32)
    rows = affine.encode_dense(weights)
    scales, biases = (mx.array(values.astype(np.float32)) for values in (rows.scales, rows.biases))
    seen = mx.dequantize(mx.array(rows.weight), scales, biases, group_size=32, bits=4)
    np.testing.assert_allclose(np.array(seen), decode(rows), atol=1e-6)
