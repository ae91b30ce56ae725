"""A head that is cut: the token ids that a draft's output head computes, and which row each of them is.

Contract: plain arithmetic on ids, the same for every backend. Columns are what a cut head puts out, in the
order of the ids, so that ties still go to the lower id. Must not know how the ids were chosen.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.types import Rules


@dataclass(frozen=True, eq=False)
class CutVocabulary:
    """The tokens that a draft may propose.

    Attributes:
        ids: [n] int32, ascending, at least one.

    Raises:
        ValueError: they are not ascending, or none.
    """

    ids: NDArray[np.int32]

    def __post_init__(self) -> None:
        if not len(self.ids) or self.ids[0] < 0 or (np.diff(self.ids) <= 0).any():
            raise ValueError("a cut vocabulary needs ids that ascend from 0 or more, and at least one")

    @cached_property
    def name(self) -> str:
        """Tells one cut from another: how many tokens, and a digest of their ids."""
        content = np.ascontiguousarray(self.ids, "<i4").tobytes()
        return f"{len(self.ids)}-{hashlib.sha256(content).hexdigest()[:8]}"

    def to_plain(self) -> str:
        """The ids as base64, a bit for each id from 0 on: some 25 KB, whichever were kept."""
        bits = np.zeros(int(self.ids[-1]) + 1, bool)
        bits[self.ids] = True
        return base64.b64encode(np.packbits(bits).tobytes()).decode("ascii")

    @classmethod
    def from_plain(cls, plain: str) -> CutVocabulary:
        """What `to_plain` wrote.

        Raises:
            ValueError: it is no base64, or holds no ids.
        """
        bits = np.unpackbits(np.frombuffer(base64.b64decode(plain, validate=True), np.uint8))
        return cls(np.flatnonzero(bits).astype(np.int32))

    def columns(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Where these tokens stand; those that were cut off are left out."""
        places = np.searchsorted(self.ids, tokens)
        return tuple(
            int(place)
            for place, token in zip(places, tokens, strict=True)
            if place < len(self.ids) and self.ids[place] == token
        )

    def missing(self, text: Sequence[int] | NDArray[np.int32], vocab_size: int) -> NDArray[np.int32]:
        """The tokens of a text that were cut off, ascending; those that a model of `vocab_size` has."""
        tokens = np.unique(np.asarray(text, np.int32))
        places = np.minimum(np.searchsorted(self.ids, tokens), len(self.ids) - 1)
        missing: NDArray[np.int32] = tokens[(tokens < vocab_size) & (self.ids[places] != tokens)]
        return missing

    def with_text(self, text: Sequence[int] | NDArray[np.int32], vocab_size: int) -> CutVocabulary:
        """These tokens and those of a text."""
        missing = self.missing(text, vocab_size)
        return CutVocabulary(np.union1d(self.ids, missing)) if len(missing) else self

    def rules(self, rules: Rules) -> Rules:
        """The same rules for rows of columns."""
        return replace(rules, masked_ids=self.columns(rules.masked_ids))

    def check_fits(self, vocab_size: int) -> None:
        """Refuse ids that a model has not.

        Raises:
            ValueError: with the highest one.
        """
        if self.ids[-1] >= vocab_size:
            raise ValueError(f"id {self.ids[-1]} is cut out of a vocabulary of {vocab_size}")
