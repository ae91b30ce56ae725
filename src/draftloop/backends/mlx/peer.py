"""mlx-lm's own generation with a draft model, to be measured against.

Contract: token ids in, the time of each round out; nothing of ours is in the loop. Must not know benchmarks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from draftloop.types import Sampling


class MlxLm:
    """A pair loaded by mlx-lm.

    Args:
        target, draft: folders; without a draft the target decodes alone.
        num_draft_tokens: K.
        eos_token_ids: any of them ends an answer.
    """

    def __init__(
        self, target: Path, draft: Path | None, num_draft_tokens: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._model, self._tokenizer, *_ = load(str(target))
        self._tokenizer.eos_token_ids = set(eos_token_ids)
        self._drafting: dict[str, Any] = {}
        if draft is not None:
            self._drafting = {"draft_model": load(str(draft))[0], "num_draft_tokens": num_draft_tokens}
        self.device = str(mx.default_device())

    def bursts(
        self, prompt_tokens: Sequence[int], max_tokens: int, sampling: Sampling, seed: int
    ) -> list[tuple[float, int]]:
        """When each round was over, in seconds, and how many tokens it gave.

        A round gives the draft tokens that it accepts and then one of the target's.
        """
        mx.random.seed(seed)
        sampler = make_sampler(sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k)
        pieces = stream_generate(
            self._model,
            self._tokenizer,
            list(prompt_tokens),
            max_tokens=max_tokens,
            sampler=sampler,
            **self._drafting,
        )
        bursts, tokens = [], 0
        for piece in pieces:
            tokens += 1
            if not piece.from_draft or piece.finish_reason is not None:
                bursts.append((time.perf_counter(), tokens))
                tokens = 0
        return bursts
