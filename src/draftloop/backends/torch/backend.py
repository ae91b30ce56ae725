"""PyTorch behind the seam: opens a device, loads folders, drafts and verifies.

Contract: `backends/base.py`. Sequences of a batch are read one after another.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from draftloop.backends.architecture import Architecture, read_architecture
from draftloop.backends.base import Cache, Capabilities, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.backends.torch.acceptance import draw, mask, to_device, verdict_of, warp
from draftloop.backends.torch.decoder import Decoder, TorchCache
from draftloop.backends.torch.weights import WeightLoader
from draftloop.errors import BackendUnavailable, ModelUnreadable, OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.types import Verdict

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def _memory_errors(what: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors, on a GPU and on a CPU, into ours."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU it is a RuntimeError like any other but for its words.
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"memory ran out while {what}",
            remedy="Lower models.target.max_kv_cache_tokens, or choose smaller models.",
        ) from error


class TorchModel:
    """One loaded decoder."""

    def __init__(self, decoder: Decoder, num_bytes: int, max_tokens: int, device: torch.device) -> None:
        self.decoder = decoder
        self._num_bytes = num_bytes
        self._max_tokens = max_tokens
        self._device = device

    @property
    def architecture(self) -> Architecture:
        """See `Model`."""
        return self.decoder.architecture

    @property
    def weight_bytes(self) -> int:
        """See `Model`."""
        return self._num_bytes

    def new_cache(self) -> TorchCache:
        """See `Model`."""
        with _memory_errors("making room for a KV cache"):
            return TorchCache(self.architecture, self._max_tokens, self.decoder.dtype, self._device)

    @torch.inference_mode()
    def prefill(self, batch: Sequence[PrefillJob]) -> None:
        """See `Model`."""
        with _memory_errors("reading a prompt"):
            for job in batch:
                self._forward(job.cache, self._ids(job.tokens))

    @torch.inference_mode()
    def propose(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """See `Model`."""
        with _memory_errors("drafting"):
            return [self._propose(job) for job in batch]

    @torch.inference_mode()
    def verify(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        """See `Model`."""
        with _memory_errors("verifying"):
            return [self._verify(job) for job in batch]

    @torch.inference_mode()
    def logits(self, cache: Cache, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Model`."""
        host: NDArray[np.float32] = self.decoder.head(self._forward(cache, self._ids(tokens))).cpu().numpy()
        return host

    def _propose(self, job: ProposeJob) -> Proposal:
        sampling = job.rules.sampling
        uniforms = to_device(job.uniforms, self._device)
        tokens: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        ids = self._ids(job.unread)
        for step in range(job.num_draft_tokens):
            logits = self.decoder.head(self._forward(job.cache, ids)[-1:])
            logits = mask(logits, job.rules, first_row=step)
            if sampling.greedy:
                ids = logits.argmax(dim=-1)
            else:
                rows.append(warp(logits, sampling))
                ids = draw(rows[-1], uniforms[step : step + 1])
            tokens.append(ids)
        return Proposal(torch.cat(tokens), torch.cat(rows) if rows else None, job.num_draft_tokens)

    def _verify(self, job: VerifyJob) -> Verdict:
        ids = self._ids((job.last,))
        if job.proposal.num_tokens:
            guesses = job.proposal.tokens
            ids = torch.cat((ids, guesses if isinstance(guesses, torch.Tensor) else self._ids(guesses)))
        return verdict_of(self.decoder.head(self._forward(job.cache, ids)), job)

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(tokens), dtype=torch.long).to(self._device, non_blocking=True)

    def _forward(self, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
        if not isinstance(cache, TorchCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this model")
        return self.decoder.forward(cache, ids)


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
        name = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
        return Capabilities(
            backend="torch",
            version=torch.__version__,
            device=name,
            dtypes=("float32", "bfloat16", "float16") if on_gpu else ("float32", "bfloat16"),
            quantized_bits=(4,),
            device_memory_bytes=torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        )

    def load(self, folder: Path, *, max_kv_cache_tokens: int) -> TorchModel:
        """See `Backend`."""
        architecture = read_architecture(folder)
        dtype = self._activation_dtype(architecture)
        with _memory_errors(f"loading {folder.name}"), torch.inference_mode():
            weights = WeightLoader(folder, architecture, dtype, self._device).load()
            decoder = Decoder(architecture, weights, dtype, max_kv_cache_tokens)
        return TorchModel(decoder, weights.num_bytes, max_kv_cache_tokens, self._device)

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
        # CPUs have fast paths for bfloat16 only; CUDA's int4 kernel computes in nothing else.
        if (on_cpu and dtype is torch.float16) or (not on_cpu and architecture.quantization is not None):
            return torch.bfloat16
        return dtype
