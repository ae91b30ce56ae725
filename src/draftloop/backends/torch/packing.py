"""The texts of a training batch one behind the other, their common beginnings once.

Contract: a token of a text depends on the ones before it alone, so texts that begin alike have the same
states there, and the gradients of all of them meet in it. Must not know a decoder.

Letters: N tokens of all texts without repetition, R response rows of all, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.backends.training import Example

LEAST_SHARED_TOKENS = 16
"""A shorter beginning is not worth the attention in two parts."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens that attend to one another, and to `shared` ones where they go on from a common beginning."""

    own: slice
    shared: slice | None = None


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """Texts without their last tokens, which predict no row.

    Attributes:
        ids: [N] on the device.
        parts: in the order of the tokens; they cover all of them.
        rows: [R] indices of the positions that predict response tokens, in the order of the texts.
        cos, sin: [N, 1, E] float32, positions counted from each text's start.
    """

    ids: torch.Tensor
    parts: tuple[Part, ...]
    rows: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def pack_texts(
    batch: Sequence[Example], vocab_size: int, cos: torch.Tensor, sin: torch.Tensor
) -> PackedTexts:
    """Lay out a batch.

    Args:
        batch: at least one example.
        vocab_size: the target may have written an id of its own padding; it is read as the last one.
        cos: [positions, 1, E] on the device, for the longest text at least.
        sin: the same.
    """
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    parts: list[Part] = []
    rows: list[torch.Tensor] = [torch.empty(0)] * len(batch)
    end = 0

    def lay(tokens: NDArray[np.int32], first: int, shared: slice | None = None) -> slice:
        nonlocal end
        own = slice(end, end + len(tokens))
        end = own.stop
        ids.append(torch.tensor(tokens, dtype=torch.long))
        positions.append(torch.arange(first, first + len(tokens)))
        parts.append(Part(own, shared))
        return own

    for group, common in alike_beginnings(batch):
        shared = lay(batch[group[0]].tokens[:common], 0) if common else None
        for index in group:
            example = batch[index]
            own = lay(example.tokens[common:-1], common, shared)
            rows[index] = torch.arange(own.start + example.num_prompt_tokens - 1 - common, own.stop)
    device = cos.device
    at = torch.cat(positions).to(device)
    return PackedTexts(
        ids=torch.cat(ids).clamp_(max=vocab_size - 1).to(device, non_blocking=True),
        parts=tuple(parts),
        rows=torch.cat(rows).to(device, non_blocking=True),
        cos=cos[at],
        sin=sin[at],
    )


def packed_tokens(batch: Sequence[Example]) -> int:
    """How many tokens `pack_texts` would lay out: N."""
    return sum(
        sum(len(batch[index].tokens) - 1 - common for index in group) + common
        for group, common in alike_beginnings(batch)
    )


def alike_beginnings(batch: Sequence[Example]) -> list[tuple[list[int], int]]:
    """Groups of texts: their indices, and how many tokens they begin with alike.

    A text shares no more than what stands before its first response row, and no beginning shorter than
    LEAST_SHARED_TOKENS. Sorted by what they may share, texts that begin alike are neighbours, and a row of
    neighbours shares what those two do that share least. Of all ways to cut that order into groups this one
    lays out the fewest tokens; the best for the first n texts is found from those for fewer.
    """
    beginnings = [example.tokens[: example.num_prompt_tokens - 1] for example in batch]
    order = sorted(range(len(batch)), key=lambda index: beginnings[index].tobytes())
    alike = [_common_tokens(beginnings[one], beginnings[other]) for one, other in pairwise(order)]
    saved, starts = [0], [0]
    for last in range(len(order)):
        start, most = last, saved[last]
        common = len(beginnings[order[last]])
        for first in range(last - 1, -1, -1):
            common = min(common, alike[first])
            if common < LEAST_SHARED_TOKENS:
                break
            if saved[first] + (last - first) * common > most:
                start, most = first, saved[first] + (last - first) * common
        saved.append(most)
        starts.append(start)
    groups: list[tuple[list[int], int]] = []
    stop = len(order)
    while stop:
        start = starts[stop]
        groups.append((order[start:stop], min(alike[start : stop - 1], default=0)))
        stop = start
    return groups[::-1]


def _common_tokens(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
