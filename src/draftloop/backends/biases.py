"""What a processor adds to logits, fitted to a head: rows for the tokens of a round.

Contract: plain arrays on the host, the same for every backend; asked only where there is a processor. Must
not know what a processor is made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.types import Processor, Rules


def draft_bias(
    rules: Rules, drafted: Sequence[int], width: int, ids: NDArray[np.int32] | None = None
) -> NDArray[np.float32] | None:
    """What is added to a draft's row behind `drafted`.

    Args:
        rules: with a processor; `masked_ids` are token ids.
        drafted: the tokens proposed before it.
        width: V of the draft.
        ids: the tokens of a cut head; None where it is whole.

    Returns:
        [V]; None where nothing may be proposed.
    """
    bias = _row(rules.processor, drafted, width)
    possible = np.isfinite(bias)
    if rules.masked_rows > len(drafted):
        possible[[token for token in rules.masked_ids if token < width]] = False
    return bias if (possible if ids is None else possible[ids]).any() else None


def target_biases(processor: Processor, drafted: Sequence[int], width: int) -> NDArray[np.float32]:
    """What is added to the target's K+1 rows: behind nothing, behind the first of `drafted`, and so on."""
    return np.stack([_row(processor, drafted[:row], width) for row in range(len(drafted) + 1)])


def _row(processor: Processor | None, drafted: Sequence[int], width: int) -> NDArray[np.float32]:
    """[width]; the target has no token behind its own vocabulary, so nothing there may be proposed."""
    bias = None if processor is None else processor.bias(drafted)
    if bias is None:
        return np.zeros(width, np.float32)
    return np.pad(bias[:width], (0, max(0, width - len(bias))), constant_values=-np.inf)
