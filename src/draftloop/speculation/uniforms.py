"""The random numbers of one request: three for each position of the answer.

Contract: number `j` depends on the seed and on the position alone, never on round boundaries, so a
rejected guess changes nothing later, and a seed fixes the output. Reusing a position's draft number in a
later round is exact: a guess behind the first rejection was never tested, so nothing emitted depends on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 64
_DRAFT, _ACCEPT, _EXTRA = range(3)


class Uniforms:
    """Uniforms in [0, 1), drawn in blocks and kept."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._values = np.empty((0, 3), dtype=np.float32)

    def _column(self, column: int, start: int, count: int) -> NDArray[np.float32]:
        while len(self._values) < start + count:
            block = self._generator.random((_BLOCK, 3), dtype=np.float32)
            self._values = np.concatenate([self._values, block])
        return self._values[start : start + count, column]

    def draft(self, start: int, count: int) -> NDArray[np.float32]:
        """[count] numbers that draw the draft's guesses from position `start` on."""
        return self._column(_DRAFT, start, count)

    def accept(self, start: int, count: int) -> NDArray[np.float32]:
        """[count] numbers that decide whether the guesses are kept."""
        return self._column(_ACCEPT, start, count)

    def extra(self, start: int, count: int) -> NDArray[np.float32]:
        """[count] numbers that draw the recovered, bonus or target token."""
        return self._column(_EXTRA, start, count)
