"""A cut vocabulary: columns and ids, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.backends.vocabulary import CutVocabulary
from draftloop.types import Rules, Sampling

kept = st.sets(st.integers(0, 60), min_size=1).map(lambda ids: np.array(sorted(ids), np.int32))
tokens = st.lists(st.integers(0, 80))


@given(kept, tokens)
def test_columns_are_where_the_tokens_stand(ids, asked):
    columns = CutVocabulary(ids).columns(asked)
    assert [int(ids[column]) for column in columns] == [token for token in asked if token in ids]


@given(kept, tokens)
def test_what_a_text_adds(ids, text):
    cut = CutVocabulary(ids)
    held = set(ids.tolist())
    assert cut.missing(text, 70).tolist() == sorted({token for token in text if token < 70} - held)
    assert cut.with_text(text, 70).ids.tolist() == sorted(held | {token for token in text if token < 70})


@given(kept)
def test_what_was_written_is_read_back(ids):
    cut = CutVocabulary(ids)
    assert CutVocabulary.from_plain(cut.to_plain()).ids.tolist() == ids.tolist()
    assert CutVocabulary.from_plain(cut.to_plain()).name == cut.name


def test_rules_are_told_in_columns():
    rules = Rules(Sampling(temperature=0.5), masked_ids=(4, 5, 9), masked_rows=3)
    cut = CutVocabulary(np.array([2, 5, 9], np.int32))
    assert cut.rules(rules) == Rules(Sampling(temperature=0.5), masked_ids=(1, 2), masked_rows=3)


def test_the_name_tells_cuts_apart():
    names = {CutVocabulary(np.array(ids, np.int32)).name for ids in ([1, 2, 3], [1, 2, 4], [1, 2], [1, 2, 3])}
    assert len(names) == 3
    assert all(name.split("-")[0] in ("2", "3") for name in names)


@pytest.mark.parametrize("ids", [[], [3, 3], [5, 4], [-1, 2]])
def test_ids_that_do_not_ascend_are_refused(ids):
    with pytest.raises(ValueError, match="ascend"):
        CutVocabulary(np.array(ids, np.int32))
