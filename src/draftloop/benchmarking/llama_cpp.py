"""llama.cpp as a peer, through xllamacpp, on the GGUF files that our models were made from.

Contract: runs in a child; token ids in, so that the prompt is the same. Must not know other peers.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftloop.benchmarking.contenders import Answer
from draftloop.errors import InputError
from draftloop.models import converted, packages
from draftloop.models.resolve import Kind, kind_of

if TYPE_CHECKING:
    from draftloop.benchmarking.child import PeerSetup
    from draftloop.benchmarking.contenders import Job
    from draftloop.models.progress import Progress


def gguf_file(name: str, progress: Progress) -> Path:
    """The GGUF file of a model of the settings.

    Raises:
        InputError: the model was never one.
    """
    kind = kind_of(name)
    if kind is Kind.PACKAGE:
        return packages.download(packages.package_model(name), progress)
    if kind is Kind.GGUF:
        return Path(name).expanduser()
    if kind is Kind.IMPORTED:
        return converted.imported_source(name, progress)
    raise InputError(
        f"llama.cpp reads GGUF files, and {name} is none",
        remedy="Name a package: model or a .gguf file in models.target.name and models.draft.name.",
    )


class LlamaCpp:
    """One server of llama.cpp, asked in this process."""

    def __init__(self, setup: PeerSetup) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(setup.target)
        params.n_ctx = setup.max_context_tokens
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup.threads
        if setup.device == "cpu":
            params.n_gpu_layers = 0
        alone = f"llama.cpp (xllamacpp {version('xllamacpp')}), {setup.threads} threads, {setup.target.name}"
        self.description = f"{alone}, the target alone"
        if setup.draft is not None:
            kinds = xllamacpp.common_speculative_type
            params.speculative.draft.mparams.path = str(setup.draft)
            params.speculative.draft.n_max = setup.num_draft_tokens
            params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            self.description = (
                f"{alone}, draft {setup.draft.name}, up to {setup.num_draft_tokens} draft tokens"
            )
        self._server = xllamacpp.Server(params)

    def answer(self, job: Job) -> Answer:
        """See `Program`. The first token comes with the prompt and is not in llama.cpp's decoding time."""
        sampling = job.sampling
        completion: dict[str, Any] = self._server.handle_completions(
            {
                "prompt": list(job.prompt_tokens),
                "max_tokens": job.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "samplers": ["temperature", "top_k", "top_p", "min_p"],
                "seed": job.seed,
                "cache_prompt": False,
            }
        )
        if "timings" not in completion:
            raise RuntimeError(str(completion)[:300])
        timings = completion["timings"]
        tokens = max(int(timings["predicted_n"]) - 1, 0)
        return Answer(
            tokens=tokens,
            seconds=float(timings["predicted_ms"]) / 1e3,
            rounds=max(tokens - int(timings.get("draft_n_accepted", 0)), 0),
        )


def open_llama_cpp(setup: PeerSetup) -> LlamaCpp:
    """Load it, in the child."""
    return LlamaCpp(setup)
