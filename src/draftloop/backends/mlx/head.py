"""An output head that is cut to some of its rows.

Contract: works on mlx-lm's module as it stands and leaves it as it is; the rows are a copy. Must not know
sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.vocabulary import CutVocabulary


class CutHead:
    """The head's rows of a cut vocabulary, n of V.

    Args:
        network: mlx-lm's module.
        architecture: its shapes.
        vocabulary: which rows.
    """

    def __init__(self, network: Any, architecture: Architecture, vocabulary: CutVocabulary) -> None:
        self.vocabulary = vocabulary
        self._vocab_size = architecture.vocab_size
        self._ids = mx.array(vocabulary.ids.astype(np.int32))
        whole = network.model.embed_tokens if architecture.tied_embeddings else network.lm_head
        self._weight = whole.weight[self._ids]
        self._quantization: dict[str, Any] = {}
        if "scales" in whole:
            parts = {name: whole[name][self._ids] for name in ("scales", "biases")}
            self._quantization = {**parts, "group_size": whole.group_size, "bits": whole.bits}
        # Another thread than this one may be the next to run the model.
        mx.eval([self._ids, *self._arrays()])

    @property
    def num_bytes(self) -> int:
        """Of the copied rows."""
        return sum(array.nbytes for array in self._arrays())

    def logits(self, hidden: mx.array) -> mx.array:
        """[…, D] -> […, n], a column for each id that was kept."""
        if not self._quantization:
            dense: mx.array = hidden @ self._weight.T
            return dense
        product: mx.array = mx.quantized_matmul(hidden, self._weight, transpose=True, **self._quantization)
        return product

    def whole_rows(self, hidden: mx.array) -> mx.array:
        """[T, D] -> [T, V], -inf where a token was cut off."""
        return self.spread(self.logits(hidden), -mx.inf)

    def token_ids(self, columns: mx.array) -> mx.array:
        """Columns of `logits` -> the token ids that they stand for, int32."""
        return self._ids[columns]

    def spread(self, rows: mx.array, elsewhere: float) -> mx.array:
        """[…, n] -> […, V], columns that are token ids."""
        spread = mx.full((*rows.shape[:-1], self._vocab_size), elsewhere, rows.dtype)
        spread[..., self._ids] = rows
        return spread

    def _arrays(self) -> Sequence[mx.array]:
        values = (self._weight, *self._quantization.values())
        return [value for value in values if isinstance(value, mx.array)]
