"""Reading a whole example at once, teacher-forced, and alpha at its response rows.

Contract: works on mlx-lm's module as it stands, adapter included; no cache is touched. The head sees the
response rows alone, a few at a time. Must not know what a prompt or a setting is.

Letters as in `backends/training.py`: T tokens, P of them the prompt, R = T - P response rows; V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from draftloop.backends.mlx.acceptance import Stages, bar, barred_tokens, numbers_of, warp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.mlx.head import CutHead
    from draftloop.backends.training import Example

HEAD_ROWS = 64
"""Rows of logits that exist at once: 40 MB in float32 for 152k entries."""


def head_of(network: Any, architecture: Architecture) -> Callable[[mx.array], mx.array]:
    """Hidden states […, D] → logits […, V]."""
    head: Callable[[mx.array], mx.array] = (
        network.model.embed_tokens.as_linear if architecture.tied_embeddings else network.lm_head
    )
    return head


def read_tokens(example: Example, architecture: Architecture) -> mx.array:
    """[T - 1] int32: the last token predicts nothing. An id past the vocabulary reads as the last row."""
    return mx.array(np.minimum(example.tokens[:-1], architecture.vocab_size - 1).astype(np.int32))


def row_chunks(num_rows: int) -> Iterator[tuple[int, int]]:
    """Start and stop of at most `HEAD_ROWS` rows each."""
    for start in range(0, num_rows, HEAD_ROWS):
        yield start, min(start + HEAD_ROWS, num_rows)


def replay(
    network: Any, architecture: Architecture, example: Example, cut: CutHead | None = None
) -> NDArray[np.float32]:
    """Alpha at each response row, [R], with a head that may be cut; see `Model.replay`."""
    head = head_of(network, architecture) if cut is None else cut.whole_rows
    hidden = network.model(read_tokens(example, architecture)[None])[0, example.num_prompt_tokens - 1 :]
    # Else every chunk's graph would hold the whole forward pass.
    mx.eval(hidden)
    alphas = [
        np.array(_alphas(head(hidden[start:stop]), example, start, stop))
        for start, stop in row_chunks(example.num_rows)
    ]
    return np.concatenate(alphas) if alphas else np.zeros(0, np.float32)


def _alphas(logits: mx.array, example: Example, start: int, stop: int) -> mx.array:
    """Rows `start` to `stop` of the example: logits [R, V] → alphas [R] float32."""
    rules = example.rules
    scores = logits.astype(mx.float32)
    if rules.masked_rows > start:
        barred = mx.array(barred_tokens(rules.masked_ids, scores.shape[1]))
        scores = bar(scores, barred, mx.array(rules.masked_rows - start))
    if rules.sampling.greedy:
        text = mx.array(example.tokens[example.num_prompt_tokens :][start:stop])
        return (scores.argmax(axis=-1).astype(mx.int32) == text).astype(mx.float32)
    q = warp(scores, Stages.of(rules.sampling), numbers_of([rules.sampling])[0])
    ids = mx.array(example.top_ids[start:stop])
    inside = mx.take_along_axis(q, mx.minimum(ids, q.shape[1] - 1), axis=-1)
    top = mx.where(ids < q.shape[1], inside, 0.0)
    tail = mx.maximum(1 - top.sum(axis=-1), 0.0)
    agreement = mx.minimum(mx.array(example.top_probs[start:stop]), top).sum(axis=-1)
    return agreement + mx.minimum(mx.array(example.tail_probs[start:stop]), tail)
