"""An output head that is cut to some of its rows, and follows the text at hand.

Contract: `logits` has a column for each of `vocabulary.ids`, ascending. Beside the rows that were chosen when
the model was loaded stand those of the text's own tokens: a second, small product, made anew when a text
brings a token that was not there before. Must not know sampling or caches.

Letters: T rows, D hidden, n columns, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.torch.linear import Linear
    from draftloop.backends.vocabulary import CutVocabulary


class CutHead:
    """The head of one draft, as it follows one text.

    Args:
        chosen: what was chosen.
        head: its rows, in the order of the ids.
        rows_of: other rows of the whole head, in the order of the ids; None where texts are not followed.
        vocab_size: V.
        device: where the ids are needed.
    """

    def __init__(
        self,
        chosen: CutVocabulary,
        head: Linear,
        rows_of: Callable[[NDArray[np.int32]], Linear] | None,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.chosen = chosen
        self.vocabulary = chosen
        self._head = head
        self._rows_of = rows_of
        self._vocab_size = vocab_size
        self._device = device
        self._beside: tuple[Linear, torch.Tensor] | None = None
        self._text: list[int] = []
        self._added = np.empty(0, np.int32)
        self._ids = torch.tensor(chosen.ids, dtype=torch.long, device=device)

    def anew(self) -> CutHead:
        """The same head, for another text."""
        return CutHead(self.chosen, self._head, self._rows_of, self._vocab_size, self._device)

    def follow(self, text: Sequence[int] | NDArray[np.int32]) -> None:
        """Keep the tokens of this text beside those that were chosen, and of no other text.

        Where it raises, the text before is still followed.
        """
        if self._rows_of is None:
            return
        tokens = text if isinstance(text, list) else np.asarray(text, np.int32).tolist()
        # A text mostly grows: to sort all of a long one each round would take longer than the head saves.
        known = len(self._text)
        grown = tokens[:known] == self._text
        fresh = tokens[known:] if grown else tokens
        missing = self.chosen.missing(fresh, self._vocab_size)
        added = np.union1d(self._added, missing) if grown else missing
        if not np.array_equal(added, self._added):
            self._add(added, self._rows_of)
        self._text = self._text + fresh if grown else [*fresh]

    def _add(self, added: NDArray[np.int32], rows_of: Callable[[NDArray[np.int32]], Linear]) -> None:
        """Put these rows, and no others, beside the chosen ones. Memory may run out: assign last."""
        device = self._device
        ids = np.concatenate((self.chosen.ids, added))
        order = np.argsort(ids)
        beside = (rows_of(added), torch.tensor(order, device=device)) if len(added) else None
        self._ids = torch.tensor(ids[order], dtype=torch.long, device=device)
        self.vocabulary = self.chosen.with_text(added, self._vocab_size)
        self._added, self._beside = added, beside

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, n] float32."""
        return self.widened(self._head(hidden).float(), hidden)

    def widened(self, chosen: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """This text's logits [T, n] of the states [T, D]; those of the chosen rows are every text's."""
        if self._beside is None:
            return chosen
        beside, order = self._beside
        return torch.cat((chosen, beside(hidden).float()), dim=1).index_select(1, order)

    def token_ids(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns -> the ids that they stand for."""
        return self._ids[columns]

    def spread(self, rows: torch.Tensor, elsewhere: float) -> torch.Tensor:
        """[T, n] -> [T, V], columns that are ids."""
        spread = rows.new_full((len(rows), self._vocab_size), elsewhere)
        return spread.index_copy_(1, self._ids, rows)

    def followed_rows(self, hidden: torch.Tensor, text: NDArray[np.int32], first: int) -> torch.Tensor:
        """[T, D], the states before the tokens text[first:], -> [T, V], -inf where a token was cut off.

        `text` is being followed; each row sees as much of it as stood there before.
        """
        logits = self.spread(self.logits(hidden), -torch.inf)
        if len(self._added):
            ends = torch.arange(first, first + len(hidden), device=logits.device)
            starts = np.array([int((text == token).argmax()) for token in self._added])
            unseen = torch.tensor(starts, device=logits.device) >= ends.unsqueeze(1)
            columns = torch.tensor(self._added, dtype=torch.long, device=logits.device)
            logits[:, columns] = logits[:, columns].masked_fill(unseen, -torch.inf)
        return logits
