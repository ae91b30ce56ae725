"""The seam between the algorithm and a backend: exactly what the algorithm needs of a model, and no more.

Contract: every operation takes a batch of sequences and treats each one as if it were alone. The core
owns the random numbers (uniforms `u` are passed in) and all policy; a backend owns arrays, kernels and
KV caches. A backend must not know what a request, a prompt or a setting is.

Cache arithmetic (design §4). The target's cache holds everything but the last emitted token; the draft's
may lag by one more. `propose` reads `unread` and its own K-1 first tokens, `verify` reads K+1 tokens; the
core trims both afterwards. Where one of these or `prefill` runs out of memory (OutOfMemory), a cache holds
what it held before, and behind that perhaps tokens that were only counted: the core trims them off, and may
try again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import AdapterForm, Lora
    from draftloop.backends.training import Example, Trainer, TrainerSettings
    from draftloop.backends.vocabulary import CutVocabulary
    from draftloop.types import Rules, Verdict


class Cache(Protocol):
    """The KV cache of one sequence in one model."""

    @property
    def position(self) -> int:
        """How many tokens the cache holds."""
        ...

    @property
    def max_tokens(self) -> int:
        """How many tokens it can hold: `max_kv_cache_tokens`."""
        ...

    def trim(self, n: int) -> None:
        """Forget the last `n` tokens; 0 <= n <= position, else ValueError."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """What one token takes, all layers, keys and values."""
        ...

    def copy(self, n: int) -> Any:
        """The first `n` tokens' keys and values, n · bytes_per_token on the device; 1 <= n <= position,
        else ValueError. OutOfMemory where there is no room for them.
        """
        ...

    def paste(self, copied: Any, n: int) -> None:
        """Hold the first `n` tokens of what `copy` gave, and nothing else. The copy stays as it is.

        The copy is of a cache of the same model and has at least `n` tokens, n >= 1, else ValueError.
        OutOfMemory leaves the cache in no certain state, to be trimmed to nothing.
        """
        ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """Draft tokens and where they came from. Arrays stay on the backend's device.

    Attributes:
        tokens: K token ids: a tuple of ints (any drafter) or a device array [K] (a draft model).
        q: the draft's warped distributions, device array [K, V_draft] float32; None means that each
            q is a point mass on its token (greedy drafting, suffix matches). Columns are token ids also
            where the draft's head is cut.
        num_tokens: K; 0 asks the target alone.
    """

    tokens: Any
    q: Any | None
    num_tokens: int


NO_PROPOSAL = Proposal(tokens=(), q=None, num_tokens=0)


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """Tokens to append to one cache."""

    cache: Cache
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class ProposeJob:
    """One sequence's share of a draft step.

    Attributes:
        cache: the draft's cache.
        unread: what the draft has not read yet, at least one token; the last one is the text's last.
        num_draft_tokens: K >= 1.
        rules: warping and masks for the K coming rows.
        uniforms: [K] float32 in [0, 1): one a drafted token.
        text: the text so far, the unread tokens included. A cut head proposes its tokens too, where
            `Capabilities.drafts_from_text` says so: an answer repeats what was asked.
    """

    cache: Cache
    unread: Sequence[int]
    num_draft_tokens: int
    rules: Rules
    uniforms: NDArray[np.float32]
    text: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class VerifyJob:
    """One sequence's share of a verification.

    Attributes:
        cache: the target's cache.
        last: the last emitted token, not yet in the cache.
        proposal: K tokens to test.
        rules: warping and masks for the K+1 coming rows.
        accept_uniforms: [K] float32 in [0, 1): d_i is kept where u_i · q_i(d_i) < p_i(d_i).
        extra_uniforms: [K+1] float32 in [0, 1): the extra token of row m is drawn with number m.
        trace: whether the verdict carries a trace.
    """

    cache: Cache
    last: int
    proposal: Proposal
    rules: Rules
    accept_uniforms: NDArray[np.float32]
    extra_uniforms: NDArray[np.float32]
    trace: bool = False


class Model(Protocol):
    """One loaded model."""

    @property
    def architecture(self) -> Architecture:
        """Its shapes."""
        ...

    @property
    def vocabulary(self) -> CutVocabulary | None:
        """What its output head was cut to when it was loaded; None where it is whole."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes its weights occupy in memory."""
        ...

    def new_cache(self) -> Cache:
        """An empty cache of `max_kv_cache_tokens`."""
        ...

    def prefill(self, batch: Sequence[PrefillJob]) -> None:
        """Read tokens without looking at the logits. Callers chunk long prompts."""
        ...

    def propose(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """Draft K tokens a sequence; nothing is brought to the host.

        Where the rules have a processor each token is, for what is added to the next row depends on it; and
        where it forbids all that this head can propose, the proposal ends there, perhaps with no token.
        """
        ...

    def verify(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        """One forward over K+1 tokens, accept / recover / bonus on the device, one host sync."""
        ...

    def logits(self, cache: Cache, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens and return their logits on the host, [T, V] float32. For tests and calibration."""
        ...

    @property
    def adapter_forms(self) -> tuple[AdapterForm, ...]:
        """The forms that `set_adapter` takes here, plainest first; `unfused` is always among them."""
        ...

    def set_adapter(self, lora: Lora | None, form: AdapterForm) -> None:
        """Deploy an adapter in place of the one before, or take it away (None). The base is never changed.

        Call it between requests. Caches that were filled before stay usable: their keys and values are
        the old draft's.

        Raises:
            ModelUnreadable: the adapter's modules or shapes are not this model's.
        """
        ...

    def replay(self, batch: Sequence[Example]) -> list[NDArray[np.float32]]:
        """Alpha at each response row, teacher-forced: what acceptance would have been with this draft, [R].

        Sampled rows: Σ over the top tokens of min(p, q) + min(p_tail, q_tail), q warped by the example's
        rules. Greedy rows: 1 where the argmax of q is the example's token, else 0.
        """
        ...


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do on this machine.

    Attributes:
        backend: its name.
        version: of the library underneath.
        device: where it runs, in words ("cpu, 2 threads, own AVX-512 kernels", "NVIDIA H100 80GB HBM3").
        dtypes: activation types it computes in.
        quantized_bits: weight widths that it multiplies without unpacking them.
        device_memory_bytes: memory of the accelerator; None where it shares the machine's.
        drafts_from_text: whether a cut head proposes also what stands in the text. Steps that are recorded
            once (CUDA graphs) have a head of fixed rows.
        records_rounds: whether the first round of each shape takes far longer than all later ones, so that
            it is best run before anybody waits for it.
    """

    backend: str
    version: str
    device: str
    dtypes: tuple[str, ...]
    quantized_bits: tuple[int, ...]
    device_memory_bytes: int | None
    drafts_from_text: bool = False
    records_rounds: bool = False


class Backend(Protocol):
    """A framework on a device."""

    def capabilities(self) -> Capabilities:
        """What it can do here."""
        ...

    def load(
        self, folder: Path, *, max_kv_cache_tokens: int, vocabulary: CutVocabulary | None = None
    ) -> Model:
        """Load a checked folder of safetensors.

        Args:
            folder: the model.
            max_kv_cache_tokens: cap of each cache.
            vocabulary: the only tokens whose logits the output head computes; every other token's are -inf,
                so that it has no probability. None computes all. Reading is not cut: a text may hold any.

        Raises:
            ModelUnreadable: an architecture, quantization or tensor that this backend cannot read.
            ValueError: `vocabulary` has ids that the model has not.
        """
        ...

    def new_trainer(self, folder: Path, lora: Lora, settings: TrainerSettings) -> Trainer:
        """A trainer that starts from `lora` on the checked folder's model.

        Raises:
            BackendUnavailable: this backend does not train.
            ModelUnreadable: as `load`, or `lora` does not fit the model.
        """
        ...

    def clear_cache(self) -> None:
        """Give back memory that the framework keeps for reuse (`memory.cache_clear_frequency`)."""
        ...
