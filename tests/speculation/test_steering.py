"""What a request adds to the logits: OpenAI's penalties, a bias, and a grammar's masks over both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.errors import InputError
from draftloop.speculation.processors import Steering

VOCABULARY = 12
tokens = st.integers(0, VOCABULARY - 1)
texts = st.lists(tokens, max_size=20)
penalties = st.floats(-2, 2, width=32)
biases = st.dictionaries(tokens, st.floats(-100, 100, width=32))


def plain_reference(logit_bias, presence, frequency, said):
    """The API's formula, word for word."""
    row = [logit_bias.get(token, 0.0) for token in range(VOCABULARY)]
    for token in range(VOCABULARY):
        count = said.count(token)
        row[token] -= count * frequency + float(count > 0) * presence
    return row


@given(biases, penalties, penalties, st.lists(texts, max_size=4), texts)
@settings(deadline=None)
def test_rows_are_the_formula(logit_bias, presence, frequency, rounds, drafted):
    processor = Steering(logit_bias, presence, frequency).processor(VOCABULARY)
    if processor is None:
        assert not any((*logit_bias.values(), presence, frequency))
        return
    said = []
    for emitted in rounds:
        processor.bias(drafted)
        assert processor.advance(emitted) == len(emitted)
        said += emitted
    # Asked in any order, and again: the draft's rows and then the target's.
    for guesses in (drafted, [], drafted[:1], drafted):
        expected = plain_reference(logit_bias, presence, frequency, said + guesses)
        np.testing.assert_allclose(processor.bias(guesses), expected, atol=1e-4)
    assert not processor.ended
    assert processor.num_allowed(drafted) == len(drafted)


def test_the_models_own_padding_is_counted_nowhere():
    """A draft may guess an id that the target has not."""
    processor = Steering(presence_penalty=1.0).processor(VOCABULARY)
    np.testing.assert_array_equal(processor.bias((VOCABULARY + 3,)), np.zeros(VOCABULARY))


@pytest.mark.parametrize(
    ("steering", "told"),
    [
        (Steering(logit_bias={VOCABULARY: 1.0}), "token 12"),
        (Steering(logit_bias={-1: 1.0}), "token -1"),
        (Steering(logit_bias={3: 100.5}), "logit_bias is 100.5"),
        (Steering(logit_bias={3: float("nan")}), "logit_bias is nan"),
        (Steering(presence_penalty=2.5), "presence_penalty is 2.5"),
        (Steering(frequency_penalty=-3.0), "frequency_penalty is -3"),
    ],
)
def test_what_cannot_be_meant_is_refused(steering, told):
    with pytest.raises(InputError, match=told):
        steering.check(VOCABULARY)


def test_nothing_asked_adds_nothing():
    assert Steering().processor(VOCABULARY) is None
    assert Steering(logit_bias={3: 0.0}).processor(VOCABULARY) is None
    Steering({3: 100.0, 4: -100.0}, 2.0, -2.0).check(VOCABULARY)
