"""An example's response rows on the device, and alpha at each of them.

Contract: the same results as the NumPy reference (`backends/numpy/replay.py`). Must not know a model.
Letters: R rows of the example or of a chunk of it, N top tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.acceptance import mask, warp

if TYPE_CHECKING:
    from draftloop.backends.training import Example


@dataclass(frozen=True, slots=True)
class ResponseRows:
    """What is known of each response row, on the device.

    top_ids: [R, N]; top_probs: [R, N] float32; tail_probs: [R] float32; tokens: [R], the text's own.
    """

    top_ids: torch.Tensor
    top_probs: torch.Tensor
    tail_probs: torch.Tensor
    tokens: torch.Tensor


def rows_of(example: Example, device: torch.device) -> ResponseRows:
    """Bring an example's rows to the device."""

    def place(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return ResponseRows(
        top_ids=place(example.top_ids, torch.long),
        top_probs=place(example.top_probs, torch.float32),
        tail_probs=place(example.tail_probs, torch.float32),
        tokens=place(example.tokens[example.num_prompt_tokens :], torch.long),
    )


def row_alphas(logits: torch.Tensor, rows: ResponseRows, example: Example, start: int) -> torch.Tensor:
    """Alpha at each of the rows from `start` on: logits [R, V] float32 -> [R] float32."""
    span = slice(start, start + len(logits))
    logits = mask(logits, example.rules, first_row=start)
    if example.rules.sampling.greedy:
        return (logits.argmax(dim=-1) == rows.tokens[span]).float()
    q = warp(logits, example.rules.sampling)
    # An id that only the target has (padding) is never proposed.
    ids = rows.top_ids[span]
    top = q.gather(1, ids.clamp(max=q.shape[1] - 1)).masked_fill_(ids >= q.shape[1], 0.0)
    tail = (1.0 - top.sum(dim=-1, dtype=torch.float64)).clamp_(min=0.0).float()
    return torch.minimum(rows.top_probs[span], top).sum(dim=-1) + torch.minimum(rows.tail_probs[span], tail)
