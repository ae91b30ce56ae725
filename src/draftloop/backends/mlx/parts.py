"""Sequences of a batch that are decided alike, so that one decision serves all of them.

Contract: what decides which operations there are is the same for all sequences of a part; the numbers in them
are each one's own. Must not know networks or caches.

Letters: n sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx
import numpy as np

from draftloop.backends.mlx.acceptance import barred_tokens, numbers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from numpy.typing import NDArray

    from draftloop.types import Rules

    Decide = Callable[..., list[mx.array]]

Kind = TypeVar("Kind", bound="Hashable")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Part:
    """One decision for several sequences.

    Attributes:
        kind: tells `decide` from all others.
        decide: (logits [n, rows, V], inputs) → outputs; pure.
        inputs: its arrays, n long.
        count: n.
        rows: how many of each sequence's rows of logits it looks at.
    """

    kind: Hashable
    decide: Decide
    inputs: list[mx.array]
    count: int
    rows: int


def alike(kinds: Sequence[Kind]) -> dict[Kind, list[int]]:
    """Which sequences are of each kind, by their index."""
    groups: dict[Kind, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    return groups


def in_batch_order(items: Sequence[Item], indexes: Sequence[int]) -> list[Item]:
    """Items that stand in the order of `indexes`, in the order of the batch."""
    places = dict(zip(indexes, items, strict=True))
    return [places[index] for index in range(len(items))]


def padded(rows: Sequence[NDArray[np.float32]], width: int) -> mx.array:
    """Rows of up to `width` numbers, [n, width], filled with 0."""
    filled = np.zeros((len(rows), width), np.float32)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return mx.array(filled)


def numbers(rules: Sequence[Rules]) -> mx.array:
    """The numbers of each one's warping, [n, 4]."""
    return numbers_of([one.sampling for one in rules])


def barred(rules: Sequence[Rules], width: int) -> mx.array:
    """The tokens that each one bars, [n, V]."""
    return mx.array(np.stack([barred_tokens(one.masked_ids, width) for one in rules]))
