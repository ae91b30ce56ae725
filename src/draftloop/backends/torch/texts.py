"""Whole texts read for their response rows: several in one pass, the beginnings that they share once.

Contract: the same states as of each text alone, on a processor with the kernels of our own to the bit. Must
not know what the rows are wanted for.

Letters: R response rows, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.decoder import TorchCache
from draftloop.backends.torch.packing import alike_beginnings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.backends.torch.decoder import Decoder
    from draftloop.backends.training import Example


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """What is still to be read of one: `ids`, of which those from `first` on predict its response rows."""

    index: int
    cache: TorchCache
    ids: torch.Tensor
    first: int


def read_texts(
    decoder: Decoder, batch: Sequence[Example], most_tokens: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The states that predict each text's response rows.

    Args:
        decoder: reads them in caches of their own.
        batch: texts; one without rows is not read.
        most_tokens: in a pass; a longer text is read by pieces.

    Yields:
        The text's index and its states, [R, D]; those of texts that begin alike one after another.
    """
    pack: list[_Text] = []
    for text in _begun(decoder, batch, most_tokens):
        if pack and sum(len(one.ids) for one in (*pack, text)) > most_tokens:
            yield from _read(decoder, pack, most_tokens)
            pack = []
        pack.append(text)
    yield from _read(decoder, pack, most_tokens)


def _begun(decoder: Decoder, batch: Sequence[Example], most_tokens: int) -> Iterator[_Text]:
    """Each text with what it shares in its cache."""
    answered = [index for index, example in enumerate(batch) if example.num_rows]
    decoder.reach(max((len(batch[index].tokens) for index in answered), default=0))
    device = decoder.weights.final_norm.device
    for group, common in alike_beginnings([batch[index] for index in answered]):
        texts = [(answered[one], batch[answered[one]]) for one in group]
        tokens = [torch.tensor(example.tokens[:-1], dtype=torch.long).to(device) for _, example in texts]
        shared = _new_cache(decoder, common)
        if common:
            _forward(decoder, shared, tokens[0][:common], most_tokens)
        for (index, example), ids in zip(texts, tokens, strict=True):
            cache = _new_cache(decoder, len(ids))
            if common:
                cache.paste(shared.values, common)
            yield _Text(index, cache, ids[common:], example.num_prompt_tokens - 1 - common)


def _read(decoder: Decoder, pack: Sequence[_Text], most_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    if len(pack) == 1:
        states = [_forward(decoder, pack[0].cache, pack[0].ids, most_tokens)]
    elif pack:
        together = decoder.forward_batch([one.cache for one in pack], [one.ids for one in pack])
        states = list(together.split([len(one.ids) for one in pack]))
    else:
        return
    for text, rows in zip(pack, states, strict=True):
        yield text.index, rows[text.first :]


def _forward(decoder: Decoder, cache: TorchCache, ids: torch.Tensor, most_tokens: int) -> torch.Tensor:
    """By pieces: the mask of their attention grows with the square."""
    return torch.cat([decoder.forward(cache, piece) for piece in ids.split(most_tokens)])


def _new_cache(decoder: Decoder, tokens: int) -> TorchCache:
    return TorchCache(decoder.architecture, tokens, decoder.dtype, decoder.weights.final_norm.device)
