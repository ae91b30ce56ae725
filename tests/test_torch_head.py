"""A cut head of PyTorch that follows a text: as it grows, and when memory runs out on the way."""

from __future__ import annotations

import numpy as np
import pytest

from draftloop.backends.vocabulary import CutVocabulary
from draftloop.errors import OutOfMemory

torch = pytest.importorskip("torch")

VOCABULARY = 50
CHOSEN = CutVocabulary(np.array([3, 8, 20], np.int32))
WEIGHT = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def rows_of(ids):
    rows = WEIGHT[torch.tensor(ids, dtype=torch.long)]
    return lambda hidden: hidden @ rows.T


def new_head(rows=rows_of):
    from draftloop.backends.torch.head import CutHead

    return CutHead(CHOSEN, rows_of(CHOSEN.ids), rows, VOCABULARY, torch.device("cpu"))


def assert_keeps(head, ids):
    assert head.vocabulary.ids.tolist() == ids
    assert head.token_ids(torch.arange(len(ids))).tolist() == ids
    torch.testing.assert_close(head.logits(HIDDEN), HIDDEN @ WEIGHT[ids].T)


def test_a_text_may_grow_shrink_and_give_way_to_another():
    head, text = new_head(), [5, 8]
    for more, ids in (([], [3, 5, 8, 20]), ([30, 5], [3, 5, 8, 20, 30]), ([3, 99], [3, 5, 8, 20, 30])):
        text += more
        head.follow(text)
        assert_keeps(head, ids)
    for other, ids in (
        (np.array([5, 30]), [3, 5, 8, 20, 30]),
        ([5, 40], [3, 5, 8, 20, 40]),
        ((), [3, 8, 20]),
    ):
        head.follow(other)
        assert_keeps(head, ids)


def test_a_text_that_found_no_room_is_not_taken_to_be_followed():
    room = [True]

    def rows(ids):
        if not room[0]:
            raise OutOfMemory("no room", remedy="Wait.")
        return rows_of(ids)

    head = new_head(rows)
    head.follow([5])
    room[0] = False
    with pytest.raises(OutOfMemory):
        head.follow([5, 30])
    assert_keeps(head, [3, 5, 8, 20])
    room[0] = True
    head.follow([5, 30])
    assert_keeps(head, [3, 5, 8, 20, 30])


def test_only_the_new_tokens_of_a_growing_text_are_looked_at(monkeypatch):
    looked_at = []
    missing = CutVocabulary.missing
    monkeypatch.setattr(
        CutVocabulary,
        "missing",
        lambda cut, text, size: (looked_at.append(len(text)), missing(cut, text, size))[1],
    )
    head, text = new_head(), [3] * 100
    head.follow(text)
    looked_at.clear()
    text += [5, 6]
    head.follow(text)
    assert max(looked_at) == 2
    assert_keeps(head, [3, 5, 6, 8, 20])
