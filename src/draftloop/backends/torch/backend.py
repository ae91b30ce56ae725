"""PyTorch behind the seam: opens a device, loads folders, drafts, verifies and wears adapters.

Contract: `backends/base.py`. Sequences of a batch share each forward pass. Where steps are recorded as CUDA
graphs, those that are treated alike share each of these and their decision too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from draftloop.backends.architecture import Architecture, read_architecture
from draftloop.backends.base import Cache, Capabilities, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.backends.torch.acceptance import verdict_of
from draftloop.backends.torch.adapter import adapter_forms, deployed_layers
from draftloop.backends.torch.cuda.graphs import graphed_steps, records_steps
from draftloop.backends.torch.cuda.rounds import RecordedDrafts, alike, verified
from draftloop.backends.torch.cuda.shapes import MAX_ROWS, TILE_ROWS, Reading, runs
from draftloop.backends.torch.decoder import Decoder, TorchCache
from draftloop.backends.torch.drafting import Draft, Piece, own_cache
from draftloop.backends.torch.head import CutHead
from draftloop.backends.torch.memory import memory_errors
from draftloop.backends.torch.native.library import load_library
from draftloop.backends.torch.replay import row_alphas, rows_of
from draftloop.backends.torch.texts import read_texts
from draftloop.backends.torch.training import TorchTrainer, open_trainer
from draftloop.backends.torch.weights import WeightLoader
from draftloop.errors import BackendUnavailable, ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from draftloop.backends.lora import AdapterForm, Lora
    from draftloop.backends.torch.cuda.graphs import GraphedSteps
    from draftloop.backends.torch.weights import Weights
    from draftloop.backends.training import Example, TrainerSettings
    from draftloop.backends.vocabulary import CutVocabulary
    from draftloop.types import Verdict

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_REPLAY_CHUNK_TOKENS = 512
"""Tokens that are read at once: the mask of their attention grows with the square."""
_REPLAY_CHUNK_ROWS = 64
"""Rows whose float32 logits are in memory at once: 39 MB at a vocabulary of 152,000."""
_SERVING_REMEDY = "Lower models.target.max_kv_cache_tokens, or choose smaller models."


class TorchModel:
    """One loaded decoder.

    Args:
        loader: made the weights; an adapter's fused forms read the folder's rows through it again.
        weights: the base's, which no adapter changes.
        max_tokens: of each cache.
        vocabulary: what the weights' head is cut to; None where it is whole.
    """

    def __init__(
        self, loader: WeightLoader, weights: Weights, max_tokens: int, vocabulary: CutVocabulary | None = None
    ) -> None:
        self.decoder = Decoder(loader.architecture, weights, loader.dtype, max_tokens)
        self._loader = loader
        self._base = weights
        self._max_tokens = max_tokens
        self._device = loader.device
        self._steps = graphed_steps(self.decoder, max_tokens)
        self._drafts: RecordedDrafts | None = None
        if self._steps is not None and vocabulary is None:
            self._drafts = RecordedDrafts(self._steps, loader.architecture.vocab_size, loader.device)
        self._cut: CutHead | None = None
        if vocabulary is not None:
            rows_of = loader.head_rows if drafts_from_text(loader.device) else None
            size = loader.architecture.vocab_size
            self._cut = CutHead(vocabulary, weights.head, rows_of, size, loader.device)
        self._following: WeakKeyDictionary[TorchCache, CutHead] = WeakKeyDictionary()
        """The cut head as each sequence's text has it."""

    @property
    def architecture(self) -> Architecture:
        """See `Model`."""
        return self.decoder.architecture

    @property
    def vocabulary(self) -> CutVocabulary | None:
        """See `Model`."""
        return None if self._cut is None else self._cut.chosen

    @property
    def weight_bytes(self) -> int:
        """See `Model`."""
        return self._base.num_bytes

    def new_cache(self) -> TorchCache:
        """See `Model`."""
        with memory_errors("making room for a KV cache", _SERVING_REMEDY):
            return TorchCache(self.architecture, self._max_tokens, self.decoder.dtype, self._device)

    @torch.inference_mode()
    def prefill(self, batch: Sequence[PrefillJob]) -> None:
        """See `Model`."""
        with memory_errors("reading a prompt", _SERVING_REMEDY):
            caches = [own_cache(job.cache) for job in batch]
            if self._steps is None:
                self.decoder.forward_batch(caches, [self._ids(job.tokens) for job in batch])
                return
            for cache, job in zip(caches, batch, strict=True):
                self._read_recorded(self._steps, cache, self._ids(job.tokens))
            # Whoever times a piece of a prompt, so as to hold nobody up, has to see what it takes.
            self._steps.wait()

    @torch.inference_mode()
    def propose(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """See `Model`."""
        with memory_errors("drafting", _SERVING_REMEDY):
            if self._drafts is None:
                return self._propose_by_steps(batch)
            return self._propose_recorded(self._drafts, [self._caught_up(job) for job in batch])

    @torch.inference_mode()
    def verify(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        """See `Model`."""
        with memory_errors("verifying", _SERVING_REMEDY):
            if self._steps is None or self._cut is not None:
                return self._verify_together(batch)
            return self._verify_recorded(self._steps, batch)

    @torch.inference_mode()
    def logits(self, cache: Cache, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Model`."""
        (rows,) = self._logits([Piece(own_cache(cache), self._ids(tokens), self._cut)])
        logits = rows if self._cut is None else self._cut.spread(rows, -torch.inf)
        host: NDArray[np.float32] = logits.cpu().numpy()
        return host

    @property
    def adapter_forms(self) -> tuple[AdapterForm, ...]:
        """See `Model`."""
        return adapter_forms(self.architecture, self._device)

    @torch.inference_mode()
    def set_adapter(self, lora: Lora | None, form: AdapterForm) -> None:
        """See `Model`. Where it raises, what was deployed before stays."""
        layers = self._base.layers
        if lora is not None:
            with memory_errors("deploying an adapter", _SERVING_REMEDY):
                layers = deployed_layers(layers, lora, form, self._loader)
        self.decoder.weights = replace(self._base, layers=layers)

    @torch.inference_mode()
    def replay(self, batch: Sequence[Example]) -> list[NDArray[np.float32]]:
        """See `Model`."""
        with memory_errors("replaying a stored request", "Lower training.max_sequence_length."):
            found = [np.empty(0, np.float32)] * len(batch)
            for index, hidden in read_texts(self.decoder, batch, _REPLAY_CHUNK_TOKENS):
                found[index] = self._alphas(batch[index], hidden)
            return found

    def _alphas(self, example: Example, hidden: torch.Tensor) -> NDArray[np.float32]:
        """Of the response rows, by the states [R, D] that predict them."""
        cut = None if self._cut is None else self._cut.anew()
        if cut is not None:
            cut.follow(example.tokens)
        rows = rows_of(example, self._device)
        alphas = []
        for chunk, start in zip(
            hidden.split(_REPLAY_CHUNK_ROWS), range(0, example.num_rows, _REPLAY_CHUNK_ROWS), strict=True
        ):
            # As the draft would have proposed by them.
            logits = (
                self.decoder.head(chunk)
                if cut is None
                else cut.followed_rows(chunk, example.tokens, example.num_prompt_tokens + start)
            )
            alphas.append(row_alphas(logits, rows, example, start))
        host: NDArray[np.float32] = torch.cat(alphas).cpu().numpy()
        return host

    def _propose_recorded(self, drafts: RecordedDrafts, batch: Sequence[ProposeJob]) -> list[Proposal]:
        proposals: dict[int, Proposal] = {}
        for which in runs([alike(job.rules) for job in batch], [len(job.unread) for job in batch]):
            jobs = [batch[index] for index in which]
            drafted = None if alike(jobs[0].rules) is None else drafts.drafted(jobs)
            proposals.update(zip(which, drafted or self._propose_by_steps(jobs), strict=True))
        return [proposals[index] for index in range(len(batch))]

    def _caught_up(self, job: ProposeJob) -> ProposeJob:
        """What is left of the job for recorded steps, once the draft has read most of what it lags behind."""
        read = len(job.unread) - 1
        if self._steps is None or read < TILE_ROWS:
            return job
        self._read_recorded(self._steps, own_cache(job.cache), self._ids(job.unread[:read]))
        return replace(job, unread=job.unread[read:])

    def _read_recorded(self, steps: GraphedSteps, cache: TorchCache, ids: torch.Tensor) -> None:
        """Read a text by pieces: a plain pass would be hundreds of launches, which take 20 ms on an H100."""
        for piece in ids.split(MAX_ROWS):
            if not steps.read(cache, piece):
                self.decoder.forward(cache, piece)

    def _propose_by_steps(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """Step j drafts for the sequences that want more than j tokens and may have them."""
        size = self.architecture.vocab_size
        drafts = [Draft(job, self._ids(job.unread), self._head_for(job), size) for job in batch]
        while wanting := [draft for draft in drafts if draft.goes_on()]:
            logits = self._logits([draft.piece for draft in wanting], last=True)
            for draft, row in zip(wanting, logits, strict=True):
                draft.draw(row)
        return [draft.proposal() for draft in drafts]

    def _head_for(self, job: ProposeJob) -> CutHead | None:
        """The cut head as this sequence's text has it."""
        if self._cut is None:
            return None
        cache = own_cache(job.cache)
        head = self._following.get(cache)
        if head is None:
            head = self._following[cache] = self._cut.anew()
        head.follow(job.text)
        return head

    def _verify_recorded(self, steps: GraphedSteps, batch: Sequence[VerifyJob]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        kinds = [None if alike(job.rules) is None else (alike(job.rules), job.trace) for job in batch]
        for which in runs(kinds, [job.proposal.num_tokens + 1 for job in batch]):
            jobs, size = [batch[index] for index in which], self.architecture.vocab_size
            found = None if kinds[which[0]] is None else verified(steps, jobs, size)
            verdicts.update(zip(which, found or self._verify_together(jobs), strict=True))
        return [verdicts[index] for index in range(len(batch))]

    def _verify_together(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        logits = self._logits([Piece(own_cache(job.cache), self._to_verify(job), self._cut) for job in batch])
        if self._cut is not None:
            logits = [self._cut.spread(rows, -torch.inf) for rows in logits]
        return [verdict_of(rows, job) for rows, job in zip(logits, batch, strict=True)]

    def _to_verify(self, job: VerifyJob) -> torch.Tensor:
        """The last token and the guesses, [K+1]."""
        ids, guesses = self._ids((job.last,)), job.proposal.tokens
        if not job.proposal.num_tokens:
            return ids
        return torch.cat((ids, guesses if isinstance(guesses, torch.Tensor) else self._ids(guesses)))

    def _ids(self, tokens: Sequence[int] | NDArray[np.int32]) -> torch.Tensor:
        return torch.tensor(list(tokens), dtype=torch.long).to(self._device, non_blocking=True)

    def _logits(self, pieces: Sequence[Piece], *, last: bool = False) -> list[torch.Tensor]:
        """Read each piece: logits of all its tokens, [T, V or n] float32, or of the last one only."""
        counts = [len(one.ids) for one in pieces]
        if self._steps is not None:
            readings = [Reading(one.cache, count) for one, count in zip(pieces, counts, strict=True)]
            recorded = self._steps.logits(readings, torch.cat([one.ids for one in pieces]))
            if recorded is not None:
                return [logits[-1:] if last else logits for logits in recorded.split(counts)]
        hidden = self.decoder.forward_batch([one.cache for one in pieces], [one.ids for one in pieces])
        if last:
            hidden = torch.cat([states[-1:] for states in hidden.split(counts)])
            counts = [1] * len(counts)
        rows = zip(pieces, self.decoder.head(hidden).split(counts), hidden.split(counts), strict=True)
        return [
            logits if piece.head is None else piece.head.widened(logits, states)
            for piece, logits, states in rows
        ]


class TorchBackend:
    """PyTorch on a CPU or a CUDA device."""

    def __init__(self, device: str = "auto") -> None:
        has_cuda = torch.cuda.is_available()
        if device == "gpu" and not has_cuda:
            raise BackendUnavailable(
                "device gpu was asked for and PyTorch sees no CUDA device",
                remedy="Use device: auto or cpu, or install a CUDA build of PyTorch.",
            )
        self._device = torch.device("cuda" if has_cuda and device != "cpu" else "cpu")

    def capabilities(self) -> Capabilities:
        """See `Backend`."""
        on_gpu = self._device.type == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else _processor()
        return Capabilities(
            backend="torch",
            version=torch.__version__,
            device=name,
            dtypes=("float32", "bfloat16", "float16") if on_gpu else ("float32", "bfloat16"),
            quantized_bits=(4,),
            device_memory_bytes=torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
            drafts_from_text=drafts_from_text(self._device),
            records_rounds=records_steps(self._device),
        )

    def load(
        self, folder: Path, *, max_kv_cache_tokens: int, vocabulary: CutVocabulary | None = None
    ) -> TorchModel:
        """See `Backend`."""
        architecture = read_architecture(folder)
        if vocabulary is not None:
            vocabulary.check_fits(architecture.vocab_size)
        dtype = self._activation_dtype(architecture)
        loader = WeightLoader(folder, architecture, dtype, self._device)
        with memory_errors(f"loading {folder.name}", _SERVING_REMEDY), torch.inference_mode():
            return TorchModel(loader, loader.load(vocabulary), max_kv_cache_tokens, vocabulary)

    def new_trainer(self, folder: Path, lora: Lora, settings: TrainerSettings) -> TorchTrainer:
        """See `Backend`."""
        architecture = read_architecture(folder)
        dtype = self._activation_dtype(architecture)
        # float16's range is too short for gradients that nobody scales.
        dtype = torch.bfloat16 if dtype is torch.float16 else dtype
        return open_trainer(WeightLoader(folder, architecture, dtype, self._device), lora, settings)

    def clear_cache(self) -> None:
        """See `Backend`."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _activation_dtype(self, architecture: Architecture) -> torch.dtype:
        dtype = _DTYPES.get(architecture.dtype)
        if dtype is None:
            raise ModelUnreadable(
                f"dtype {architecture.dtype} is not supported",
                remedy=f"Choose a checkpoint in {', '.join(_DTYPES)}.",
            )
        on_cpu = self._device.type == "cpu"
        # CPUs have fast paths for bfloat16 only; CUDA's int4 kernels compute in nothing else.
        if (on_cpu and dtype is torch.float16) or (not on_cpu and architecture.quantization is not None):
            return torch.bfloat16
        return dtype


def drafts_from_text(device: torch.device) -> bool:
    """A recorded step on a GPU has a head of fixed rows."""
    return device.type == "cpu"


def _processor() -> str:
    threads = torch.get_num_threads()
    kernels = "PyTorch's kernels" if load_library(threads) is None else "own AVX-512 kernels"
    return f"cpu, {threads} threads, {kernels}"
