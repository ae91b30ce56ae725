"""The order in which a GPU's kernels read 4-bit weights, by what the order is said to be."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from draftloop.backends.torch.cuda import products  # noqa: E402
from draftloop.backends.torch.cuda.driver import CudaError, translated  # noqa: E402
from draftloop.backends.torch.cuda.packed import packed_int4_linear, packed_pairs, packed_words  # noqa: E402
from draftloop.backends.torch.linear import AffineWeight, unpack_codes  # noqa: E402


def words(rows, width):
    random = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31 - 1, (rows, width // 8), generator=random, dtype=torch.int32)


@pytest.mark.parametrize(("rows", "width"), [(16, 64), (48, 256), (37, 128)])
def test_every_code_stands_where_its_lane_looks(rows, width):
    stored = words(rows, width)
    codes, packed = unpack_codes(stored), packed_words(stored)
    assert packed.shape == (-(-rows // 16), width // 64, 32, 4)
    for n in range(rows):
        lower, g = divmod(n % 16, 8)
        for k in range(width):
            half, q, step, pair, odd = k % 64 // 32, k % 32 // 8, k % 8 // 4, k % 4 // 2, k % 2
            word = int(packed[n // 16, k // 64, 4 * g + q, 2 * half + step])
            assert word >> 4 * (lower + 2 * pair + 4 * odd) & 15 == int(codes[n, k])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_groups_scale_stands_beside_that_of_eight_rows_on(group):
    pairs = torch.arange(48 * (256 // group), dtype=torch.int32).view(48, -1)
    packed = packed_pairs(pairs, group)
    for n in range(48):
        lower, g = divmod(n % 16, 8)
        for at in range(256 // group):
            block, inner = divmod(at, packed.shape[3])
            assert packed[n // 16, block, g, inner, lower] == pairs[n, at]


def test_a_device_without_the_kernels_gets_none():
    part = AffineWeight(words(16, 64), torch.ones(16, 2), torch.ones(16, 2))
    assert packed_int4_linear([part], None, 32, torch.device("cpu")) is None


@pytest.mark.parametrize("epilogue", products.Epilogue)
@pytest.mark.parametrize("codes", [0, 32, 64, 128])
def test_the_source_compiles_for_every_use(codes, epilogue):
    variant = products.Variant(codes, products.Cut(2, 8, 2), epilogue, columns=2, scaled=True)
    try:
        code = translated(products.SOURCE, variant.macros, (9, 0))
    except CudaError as error:
        if "cannot be loaded" not in str(error):
            raise
        pytest.skip("NVRTC is not installed")
    assert code[1:4] == b"ELF"
