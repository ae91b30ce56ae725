"""A request's arrays come back as they were, and damage is noticed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from storage_samples import make_traces

from draftloop.storage.packing import Contents, pack, unpack
from draftloop.storage.records import TraceRows
from draftloop.types import TRACE_TOP_TOKENS

INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
LOGPROB = st.floats(width=16, max_value=0, allow_nan=False)


@st.composite
def contents(draw: st.DrawFn) -> Contents:
    """Any arrays that fit together; log-probabilities of 16 bits, -inf among them."""
    prompt, rows = draw(st.integers(0, 40)), draw(st.integers(0, 12))

    def column(dtype: type, values: st.SearchStrategy, *shape: int) -> np.ndarray:
        return draw(hnp.arrays(dtype, shape, elements=values))

    return Contents(
        prompt_tokens=column(np.int32, INT32, prompt),
        answer_tokens=column(np.int32, INT32, rows),
        traces=TraceRows(
            round_index=column(np.int32, INT32, rows),
            kinds=column(np.uint8, st.integers(0, 255), rows),
            draft_ids=column(np.int32, INT32, rows),
            draft_probs=column(np.float32, FLOAT32, rows),
            top_ids=column(np.int32, INT32, rows, TRACE_TOP_TOKENS),
            top_logprobs=column(np.float32, LOGPROB, rows, TRACE_TOP_TOKENS),
            tail_mass=column(np.float32, FLOAT32, rows),
        ),
    )


def arrays(packed: Contents) -> dict[str, np.ndarray]:
    traces = {field.name: getattr(packed.traces, field.name) for field in dataclasses.fields(TraceRows)}
    return {"prompt_tokens": packed.prompt_tokens, "answer_tokens": packed.answer_tokens, **traces}


def sample(rows: int = 3) -> Contents:
    return Contents(np.arange(5, dtype=np.int32), np.arange(rows, dtype=np.int32), make_traces(rows))


@given(contents())
@settings(max_examples=60, deadline=None)
def test_arrays_come_back_to_the_bit(before: Contents) -> None:
    after = arrays(unpack(pack(before)))
    for name, values in arrays(before).items():
        assert after[name].dtype == values.dtype, name
        assert after[name].shape == values.shape, name
        assert after[name].tobytes() == values.tobytes(), name


def test_a_vocabulary_smaller_than_a_row_keeps_its_padding() -> None:
    traces = dataclasses.replace(
        make_traces(1),
        top_ids=np.pad([[2, 0, 1]], ((0, 0), (0, 29)), constant_values=-1).astype(np.int32),
        top_logprobs=np.pad([[-0.5, -1.5, -2]], ((0, 0), (0, 29)), constant_values=-np.inf).astype(
            np.float32
        ),
    )
    after = unpack(pack(Contents(np.zeros(1, np.int32), np.zeros(1, np.int32), traces))).traces
    assert after.top_ids[0, :4].tolist() == [2, 0, 1, -1]
    assert after.top_logprobs[0, :4].tolist() == [-0.5, -1.5, -2, -np.inf]


@given(st.floats(-60, 0, width=32))
def test_a_logprob_loses_no_more_than_16_bits_ask_for(logprob: float) -> None:
    traces = dataclasses.replace(
        make_traces(1), top_logprobs=np.full((1, TRACE_TOP_TOKENS), logprob, np.float32)
    )
    after = unpack(pack(dataclasses.replace(sample(1), traces=traces))).traces.top_logprobs
    assert abs(float(after[0, 0]) - logprob) <= max(abs(logprob) * 2**-11, 2**-25)


@pytest.mark.filterwarnings("error")
def test_a_logprob_beyond_16_bits_is_no_probability() -> None:
    traces = dataclasses.replace(
        make_traces(1), top_logprobs=np.full((1, TRACE_TOP_TOKENS), -1e9, np.float32)
    )
    after = unpack(pack(dataclasses.replace(sample(1), traces=traces))).traces.top_logprobs
    assert np.isneginf(after).all()


def test_arrays_that_are_read_may_be_written_to() -> None:
    assert all(values.flags.writeable for values in arrays(unpack(pack(sample()))).values())


def test_a_position_takes_about_220_bytes() -> None:
    assert len(pack(sample(101))) - len(pack(sample(100))) == 213


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TraceRows)])
def test_a_column_of_another_length_is_refused(name: str) -> None:
    wrong = sample(3)
    traces = dataclasses.replace(wrong.traces, **{name: getattr(wrong.traces, name)[:2]})
    with pytest.raises(ValueError, match=name):
        pack(dataclasses.replace(wrong, traces=traces))


@given(st.data())
def test_one_damaged_bit_is_noticed_wherever_it_is(data: st.DataObject) -> None:
    packed = bytearray(pack(sample()))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match=r"checksum|layout"):
        unpack(bytes(packed))


@given(st.integers(0, len(pack(sample())) - 1))
def test_missing_bytes_are_noticed(kept: int) -> None:
    with pytest.raises(ValueError, match=r"checksum|too few"):
        unpack(pack(sample())[:kept])


def test_a_later_layout_is_told_apart() -> None:
    with pytest.raises(ValueError, match="layout 2 is not 1"):
        unpack(b"\x02" + pack(sample())[1:])
