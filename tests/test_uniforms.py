"""The random numbers: fixed by seed and position, whatever is asked in between."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from draftloop.speculation.uniforms import Uniforms

SPANS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9)), max_size=12)


@given(seed=st.integers(0, 2**32), spans=SPANS)
def test_a_position_has_its_number_however_it_is_asked(seed: int, spans: list[tuple[int, int]]) -> None:
    asked, whole = Uniforms(seed), Uniforms(seed)
    columns = {name: getattr(whole, name)(0, 310) for name in ("draft", "accept", "extra")}
    for start, count in spans:
        for name, values in columns.items():
            np.testing.assert_array_equal(getattr(asked, name)(start, count), values[start : start + count])


def test_the_three_numbers_of_a_position_are_independent() -> None:
    numbers = Uniforms(7)
    columns = np.stack([numbers.draft(0, 4000), numbers.accept(0, 4000), numbers.extra(0, 4000)])
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < 0.06
    assert columns.min() >= 0
    assert columns.max() < 1


def test_seeds_differ() -> None:
    assert not np.array_equal(Uniforms(1).draft(0, 8), Uniforms(2).draft(0, 8))
