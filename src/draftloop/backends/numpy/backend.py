"""`NumpyBackend`: the seam of `backends/base.py` over the reference decoder and the reference rule.

Contract: float32 decoder, float64 distributions, nothing clever. For toys and for tests.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import numpy as np

from draftloop.backends.architecture import read_architecture
from draftloop.backends.base import NO_PROPOSAL, Capabilities, Proposal
from draftloop.backends.biases import draft_bias, target_biases
from draftloop.backends.numpy.acceptance import accept, draw, top_tokens, warp
from draftloop.backends.numpy.adapter import FORMS
from draftloop.backends.numpy.decoder import Decoder, NumpyCache
from draftloop.backends.numpy.replay import alpha_rows
from draftloop.backends.numpy.weights import read_weights
from draftloop.errors import BackendUnavailable
from draftloop.types import Trace, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.base import Cache, PrefillJob, ProposeJob, VerifyJob
    from draftloop.backends.lora import AdapterForm, Lora
    from draftloop.backends.training import Example, Trainer, TrainerSettings
    from draftloop.backends.vocabulary import CutVocabulary


class NumpyBackend:
    """NumPy on the processor.

    Args:
        device: `auto` or `cpu`, which are the same.

    Raises:
        BackendUnavailable: another device.
    """

    def __init__(self, device: str = "auto") -> None:
        if device not in ("auto", "cpu"):
            raise BackendUnavailable(
                f"the numpy backend has no device {device!r}", remedy="Choose device auto or cpu."
            )

    def capabilities(self) -> Capabilities:
        """What it can do here: float32, nothing quantized."""
        return Capabilities(
            backend="numpy",
            version=np.__version__,
            device=f"cpu, {os.cpu_count()} threads",
            dtypes=("float32",),
            quantized_bits=(),
            device_memory_bytes=None,
            drafts_from_text=True,
        )

    def load(
        self, folder: Path, *, max_kv_cache_tokens: int, vocabulary: CutVocabulary | None = None
    ) -> NumpyModel:
        """Load a folder; 4-bit weights are unpacked to float32.

        Raises:
            ModelUnreadable: a file is damaged, a tensor missing, or the architecture another.
            ValueError: `vocabulary` has ids that the model has not.
        """
        architecture = read_architecture(folder)
        if vocabulary is not None:
            vocabulary.check_fits(architecture.vocab_size)
        decoder = Decoder(architecture, read_weights(folder, architecture.quantization))
        return NumpyModel(architecture, decoder, max_kv_cache_tokens, vocabulary)

    def new_trainer(self, folder: Path, lora: Lora, settings: TrainerSettings) -> Trainer:  # noqa: ARG002
        """Never: the reference has no backward pass.

        Raises:
            BackendUnavailable: always.
        """
        raise BackendUnavailable(
            "the numpy backend does not train", remedy="Set backend: torch, or mlx on Apple silicon."
        )

    def clear_cache(self) -> None:
        """Nothing to do: NumPy keeps no memory for reuse."""


class NumpyModel:
    """One decoder behind the seam. Being the reference, it computes a whole head and cuts its logits."""

    def __init__(
        self,
        architecture: Architecture,
        decoder: Decoder,
        max_kv_cache_tokens: int,
        vocabulary: CutVocabulary | None = None,
    ) -> None:
        self._architecture = architecture
        self._decoder = decoder
        self._max_kv_cache_tokens = max_kv_cache_tokens
        self._vocabulary = vocabulary

    @property
    def architecture(self) -> Architecture:
        """Its shapes."""
        return self._architecture

    @property
    def vocabulary(self) -> CutVocabulary | None:
        """What its logits are cut to."""
        return self._vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes its weights occupy, unpacked."""
        return self._decoder.weight_bytes

    def new_cache(self) -> NumpyCache:
        """An empty cache."""
        return NumpyCache(self._architecture, self._max_kv_cache_tokens)

    def prefill(self, batch: Sequence[PrefillJob]) -> None:
        """Append tokens to each job's cache."""
        for job in batch:
            self._read(job.cache, job.tokens)

    def propose(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """Draft K tokens for each job; tokens [K] int64 and, unless greedy, q [K, V] float64."""
        return [self._propose(job) for job in batch]

    def verify(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        """Test each job's proposal."""
        return [self._verify(job) for job in batch]

    def logits(self, cache: Cache, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens [T] and return their logits [T, V]."""
        return self._read(cache, tokens)

    @property
    def adapter_forms(self) -> tuple[AdapterForm, ...]:
        """Beside its modules, and dense."""
        return FORMS

    def set_adapter(self, lora: Lora | None, form: AdapterForm) -> None:
        """Deploy an adapter, or take it away; see `Decoder.set_adapter` for what it raises."""
        self._decoder.set_adapter(lora, form)

    def replay(self, batch: Sequence[Example]) -> list[NDArray[np.float32]]:
        """Alpha at each response row of each example, [R]."""
        return [self._replay(example) for example in batch]

    def _replay(self, example: Example) -> NDArray[np.float32]:
        # The last token predicts no row; a cache of the example's own length is never too short.
        cache = NumpyCache(self._architecture, len(example.tokens))
        first, tokens = example.num_prompt_tokens, example.tokens.tolist()
        logits = self._decoder.forward(cache, tokens[:-1])[first - 1 :]
        rows = [self._cut(row[None], tokens[: first + i]) for i, row in enumerate(logits)]
        return alpha_rows(np.concatenate([*rows, logits[:0]]), example)

    def _read(self, cache: Cache, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._cut(self._decoder.forward(cast("NumpyCache", cache), tokens), ())

    def _cut(self, logits: NDArray[np.float32], text: Sequence[int]) -> NDArray[np.float32]:
        """Logits [R, V] of the kept tokens and those of `text`; -inf elsewhere."""
        ids = self._kept(text)
        if ids is None:
            return logits
        cut = np.full_like(logits, -np.inf)
        cut[:, ids] = logits[:, ids]
        return cut

    def _kept(self, text: Sequence[int]) -> NDArray[np.int32] | None:
        if self._vocabulary is None:
            return None
        return self._vocabulary.with_text(text, self._architecture.vocab_size).ids

    def _propose(self, job: ProposeJob) -> Proposal:
        rules, width = job.rules, self._architecture.vocab_size
        coming: Sequence[int] = job.unread
        tokens: list[int] = []
        rows = []
        for i in range(job.num_draft_tokens):
            bias = None
            if rules.processor is not None:
                bias = draft_bias(rules, tokens, width, self._kept(job.text))
                if bias is None:
                    break
            logits = self._decoder.forward(cast("NumpyCache", job.cache), coming)[-1:]
            logits = self._cut(logits, job.text)
            logits = logits if bias is None else logits + bias
            rows.append(warp(logits, rules.sampling, rules.masked_ids, rules.masked_rows - i))
            tokens.append(draw(rows[-1][0], float(job.uniforms[i])))
            coming = tokens[-1:]
        if not tokens:
            return NO_PROPOSAL
        q = None if rules.sampling.greedy else np.concatenate(rows)
        return Proposal(tokens=np.array(tokens, np.int64), q=q, num_tokens=len(tokens))

    def _verify(self, job: VerifyJob) -> Verdict:
        rules, q = job.rules, job.proposal.q
        tokens = tuple(int(token) for token in job.proposal.tokens)
        logits = self._read(job.cache, (job.last, *tokens))
        biased = logits
        if rules.processor is not None:
            biased = logits + target_biases(rules.processor, tokens, logits.shape[1])
        p = warp(biased, rules.sampling, rules.masked_ids, rules.masked_rows)
        decision = accept(p, q, tokens, job.accept_uniforms, job.extra_uniforms)
        kept = decision.accepted_tokens
        trace = _trace(logits[: kept + 1], tokens, q) if job.trace else None
        return Verdict(tokens, kept, decision.extra_token, decision.alphas, trace)


def _trace(logits: NDArray[np.float32], tokens: tuple[int, ...], q: NDArray[np.float64] | None) -> Trace:
    """What the target said in the emitted rows [R, V], beside what was proposed there."""
    top = top_tokens(logits)
    draft_ids = np.full(len(logits), -1, np.int32)
    draft_probs = np.zeros(len(logits), np.float32)
    for row, token in enumerate(tokens[: len(logits)]):
        draft_ids[row] = token
        draft_probs[row] = 1.0 if q is None else q[row, token]
    return Trace(top.ids, top.logprobs, top.tail_mass, draft_ids, draft_probs)
