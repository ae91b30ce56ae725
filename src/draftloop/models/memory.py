"""What a pair needs of memory, from its shapes and the settings alone, before anything is loaded.

Contract: `plan_memory` is arithmetic on two architectures and a configuration; every formula stands in a
docstring below. It leans to the high side. Must not know a framework or a file.

Letters: V vocabulary, D hidden size, F MLP width, L layers, Q and G widths of all query and all key (or
value) heads, K num_draft_tokens, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.errors import MemoryPlanError
from draftloop.models.memory_advice import advice, gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.architecture import Architecture
    from draftloop.config import Config

MEGABYTE = 1_000_000
"""Settings count memory in millions of bytes."""

KV_BYTES = 2
"""Backends keep keys and values in 16 bits."""

PREFILL_TOKENS = 256
"""Tokens of a prompt that are read at once (`speculation.stream.PREFILL_CHUNK_TOKENS`)."""

MASK_BYTES = 5
"""Of each query and cached token while a prompt's piece attends: a boolean, and the float it becomes."""

LOGIT_COPIES = 4
"""Float32 rows alive at once while p is made: logits, the sorted ones, their cumulative sum, p."""

TRAINING_LOGIT_COPIES = 3
"""Float32 rows alive at once in the loss: logits, log-probabilities, their gradient."""

ACTIVATION_BYTES = 2
"""Training computes in bfloat16."""

PACKED_TOKENS = 768
"""Small batches are read together up to so many tokens (`backends/torch/training.py`, on a CPU)."""

LORA_BYTES = 16
"""Of each LoRA weight: float32 itself, its gradient, and Adam's two moments."""

RUNTIME_BYTES = 512 * 2**20
"""Python, the framework and both tokenizers: 474 MB with PyTorch 2.13 and two of 152k tokens on Linux."""

_CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits (cgroup v2)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the plan.

    Attributes:
        label: what it is, in words.
        num_bytes: how much.
        in_generation: it is there while a pair generates.
        in_training: it is there while the draft trains alone (traces hold p, so the target is not needed).
    """

    label: str
    num_bytes: int
    in_generation: bool
    in_training: bool


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What generating and training need, against what there is.

    Attributes:
        parts: every part, the largest models first.
        available_bytes: what the plan has to fit into.
        generation_advice: what helps most where generating does not fit.
        training_advice: the same for training.
        combined_advice: the same for training while the pair generates.
        answer_bytes: what each answer takes that is made beside the first.
    """

    parts: tuple[Part, ...]
    available_bytes: int
    generation_advice: str
    training_advice: str
    combined_advice: str
    answer_bytes: int

    def answers_at_once(self, most: int) -> int:
        """How many answers can be made together, 1 to `most`."""
        spare = max(0, self.available_bytes - self.generation_bytes)
        return min(most, 1 + spare // self.answer_bytes)

    @property
    def generation_bytes(self) -> int:
        """Both models, generating."""
        return sum(part.num_bytes for part in self.parts if part.in_generation)

    @property
    def training_bytes(self) -> int:
        """The draft alone, training."""
        return sum(part.num_bytes for part in self.parts if part.in_training)

    @property
    def combined_bytes(self) -> int:
        """Both models, generating while the draft trains in a process of its own.

        What both need, the draft's weights and the framework, is there twice.
        """
        return self.generation_bytes + self.training_bytes

    def check_generation(self) -> None:
        """Refuse a pair that does not fit.

        Raises:
            MemoryPlanError: with the plan, and the setting that would help most.
        """
        self._check("generating", self.generation_bytes, self.generation_advice)

    def check_training(self) -> None:
        """Refuse training settings that do not fit.

        Raises:
            MemoryPlanError: with the plan, and the setting that would help most.
        """
        self._check("training", self.training_bytes, self.training_advice)

    def check_combined(self) -> None:
        """Refuse to learn in the background where that does not fit beside the pair.

        Raises:
            MemoryPlanError: with the plan, and the setting that would help most.
        """
        self._check("generating and training at once", self.combined_bytes, self.combined_advice)

    def _check(self, work: str, needed_bytes: int, advice: str) -> None:
        if needed_bytes > self.available_bytes:
            raise MemoryPlanError(
                f"{work} needs {gib(needed_bytes)} of memory and {gib(self.available_bytes)} is available",
                remedy=advice,
                details=render(self),
            )


def available_memory_bytes() -> int:
    """What this machine, or the container around the process, could give it without swapping."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        # No cgroup v2 here, or one without a limit ("max").
        return free
    return min(free, max(0, limit - used))


def plan_memory(
    target: Architecture,
    draft: Architecture | None,
    config: Config,
    available_bytes: int | None = None,
    *,
    num_suffix_tokens: int,
) -> MemoryPlan:
    """The plan of a pair under a configuration.

    Args:
        target: shapes of the target.
        draft: shapes of the draft; None where the target answers alone.
        config: the settings.
        available_bytes: of the accelerator; None takes what this machine has free.
        num_suffix_tokens: the most that a suffix match proposes in a round; 0 where none is looked for.

    Raises:
        MemoryPlanError: `training.lora.rank` exceeds a side of a target module, so that the adapter would
            hold more numbers than what it adapts.
    """
    if draft is not None:
        _check_rank(draft, config)
    if available_bytes is None:
        available_bytes = available_memory_bytes()

    def needed(generation: bool, training: bool, changed: Config) -> int:
        parts = _parts(target, draft, changed, num_suffix_tokens)
        return sum(
            part.num_bytes * ((generation and part.in_generation) + (training and part.in_training))
            for part in parts
        )

    def advised(generation: bool, training: bool) -> str:
        return advice(partial(needed, generation, training), config, available_bytes, training=training)

    return MemoryPlan(
        parts=_parts(target, draft, config, num_suffix_tokens),
        available_bytes=available_bytes,
        generation_advice=advised(True, False),
        training_advice=advised(False, True),
        combined_advice=advised(True, True),
        answer_bytes=answer_bytes(target, draft, config),
    )


def render(plan: MemoryPlan) -> str:
    """The plan as a plain table: a line for each part, then the totals."""
    rows = [
        (part.label, part.num_bytes, "x" if part.in_generation else "", "x" if part.in_training else "")
        for part in plan.parts
    ]
    width = max(len(label) for label, *_ in rows)
    lines = [f"{'part':<{width}}  {'memory':>10}  generation  training"]
    lines += [f"{label:<{width}}  {gib(size):>10}  {a:^10}  {b:^8}".rstrip() for label, size, a, b in rows]
    totals = (
        ("generation", plan.generation_bytes),
        ("training", plan.training_bytes),
        ("both at once", plan.combined_bytes),
        ("available", plan.available_bytes),
    )
    return "\n".join(lines + [f"{label:<{width}}  {gib(size):>10}" for label, size in totals])


def weight_bytes(architecture: Architecture) -> int:
    """Bytes of a model's weights as its checkpoint stores them.

    L · Σ out·in of a layer's seven linear modules, V·D for the embedding and as much again for an untied
    head, at the quantization's bits per weight or the dtype's; norms and biases at the dtype's.
    """
    a = architecture
    dtype_bytes = DTYPE_BYTES.get(a.dtype, 4)
    matrices = a.num_layers * sum(rows * columns for rows, columns in a.linear_shapes.values())
    matrices += a.vocab_size * a.hidden_size * (1 if a.tied_embeddings else 2)
    q, g = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    vectors = a.num_layers * (2 * a.hidden_size + (q + 2 * g if a.attention_bias else 0)) + a.hidden_size
    bits = a.quantization.bits_per_weight if a.quantization else 8 * dtype_bytes
    return round(matrices * bits / 8) + vectors * dtype_bytes


def cut_head_bytes(draft: Architecture, config: Config) -> int:
    """A cut head's rows at the checkpoint's bits per weight: a copy, for the embedding keeps its own.

    Counted as if the rows were at most `speculative.draft_vocabulary`, or half of all where it is `auto`.
    """
    asked = config.speculative.draft_vocabulary
    rows = draft.vocab_size // 2 if asked == "auto" else 0 if asked == "full" else asked
    if rows >= draft.vocab_size:
        return 0
    bits = draft.quantization.bits_per_weight if draft.quantization else 8 * DTYPE_BYTES.get(draft.dtype, 4)
    return round(rows * draft.hidden_size * bits / 8)


def kv_cache_bytes(architecture: Architecture, max_kv_cache_tokens: int) -> int:
    """2 bytes for each key and value of each layer and token (`Architecture.kv_values_per_token`)."""
    return KV_BYTES * architecture.kv_values_per_token * max_kv_cache_tokens


def answer_bytes(target: Architecture, draft: Architecture | None, config: Config) -> int:
    """An answer's own part of a shared round: both KV caches, and K + 1 rows of logits (4 float32 copies)."""
    models = config.models
    num_bytes = kv_cache_bytes(target, models.target.max_kv_cache_tokens)
    if draft is not None:
        num_bytes += kv_cache_bytes(draft, models.draft.max_kv_cache_tokens)
    return num_bytes + 4 * (config.speculative.num_draft_tokens + 1) * target.vocab_size * LOGIT_COPIES


def generation_scratch_bytes(architecture: Architecture, num_rows: int, max_kv_cache_tokens: int) -> int:
    """What one forward needs beside weights and cache, in float32.

    A prompt's piece: 256 tokens · (3 D + 3 F + 2 Q + 2 G), one layer at a time, and which cached token each
    of its query heads sees, 256 · heads / KV heads · max_kv_cache_tokens, as a byte and once more as a float.
    Verifying: `num_rows` rows of logits, 4 copies. The larger of the two, for they take turns.
    """
    a = architecture
    q, g = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    prefill = PREFILL_TOKENS * (3 * a.hidden_size + 3 * a.intermediate_size + 2 * q + 2 * g)
    mask = PREFILL_TOKENS * (a.num_heads // a.num_kv_heads) * max_kv_cache_tokens * MASK_BYTES
    return max(4 * prefill + mask, 4 * num_rows * a.vocab_size * LOGIT_COPIES)


def lora_parameters(draft: Architecture, rank: int, target_modules: Sequence[str]) -> int:
    """L · Σ r · (out + in) over the target modules (Hu et al. 2021)."""
    shapes = draft.linear_shapes
    return draft.num_layers * sum(rank * sum(shapes[module]) for module in target_modules)


def training_activation_bytes(draft: Architecture, config: Config) -> int:
    """What the backward pass needs of the forward pass, in bfloat16.

    A layer keeps 4 D (its input, the middle of the residual stream, two norms), 2 Q + 2 G (query, key,
    value, attention's output; attention itself is recomputed from them), 4 F (gate, up, the gate's SiLU,
    their product) and r for each target module, of every token of the batch (batch_size ·
    max_sequence_length). Smaller batches of one step are read together, up to PACKED_TOKENS. Gradient
    checkpointing keeps D a layer, and all of it for one layer at a time.
    """
    lora = config.training.lora
    q, g = draft.num_heads * draft.head_dim, draft.num_kv_heads * draft.head_dim
    layer = 4 * draft.hidden_size + 2 * q + 2 * g + 4 * draft.intermediate_size
    layer += lora.rank * len(lora.target_modules)
    kept = draft.num_layers * layer
    if config.memory.gradient_checkpointing:
        kept = draft.num_layers * draft.hidden_size + layer
    tokens = config.training.batch_size * config.training.max_sequence_length
    together = min(PACKED_TOKENS, tokens * config.training.gradient_accumulation_steps)
    tokens = max(tokens, together)
    return ACTIVATION_BYTES * tokens * kept


def training_logit_bytes(draft: Architecture, config: Config) -> int:
    """V float32 numbers, 3 copies, for each response position of the batch.

    Only response positions go through the head; a response has at most `generation.max_tokens` of the
    `max_sequence_length`.
    """
    response_tokens = min(config.training.max_sequence_length, config.generation.max_tokens)
    return 4 * TRAINING_LOGIT_COPIES * draft.vocab_size * config.training.batch_size * response_tokens


def _parts(
    target: Architecture, draft: Architecture | None, config: Config, num_suffix_tokens: int
) -> tuple[Part, ...]:
    rows = config.speculative.num_draft_tokens + 1
    target_tokens = config.models.target.max_kv_cache_tokens
    matched = num_suffix_tokens if draft is not None else 0
    scratch = generation_scratch_bytes(target, max(rows, matched + 1), target_tokens)
    target_cache = kv_cache_bytes(target, target_tokens)
    generation, training, both = (True, False), (False, True), (True, True)
    entries = [
        ("target: weights", weight_bytes(target), generation),
        ("target: KV cache", target_cache, generation),
    ]
    if draft is not None:
        lora = config.training.lora
        draft_tokens = config.models.draft.max_kv_cache_tokens
        scratch += generation_scratch_bytes(draft, rows, draft_tokens)
        draft_cache = kv_cache_bytes(draft, draft_tokens)
        cut = cut_head_bytes(draft, config)
        adapter = LORA_BYTES * lora_parameters(draft, lora.rank, lora.target_modules)
        entries += [
            ("draft: weights", weight_bytes(draft), both),
            *([("draft: cut output head", cut, generation)] if cut else []),
            ("draft: KV cache", draft_cache, generation),
            ("LoRA: weights, gradients, Adam's moments", adapter, training),
            ("training: activations", training_activation_bytes(draft, config), training),
            ("training: logits", training_logit_bytes(draft, config), training),
        ]
    if matched:
        entries.append(("past answers", MEGABYTE * config.speculative.suffix.megabytes, generation))
    entries += [
        ("prefix cache", MEGABYTE * config.memory.prefix_cache_megabytes, generation),
        ("activations and logits of a round", scratch, generation),
        ("Python and the framework", RUNTIME_BYTES, both),
    ]
    return tuple(Part(label, num_bytes, *when) for label, num_bytes, when in entries)


def _check_rank(draft: Architecture, config: Config) -> None:
    rank = config.training.lora.rank
    sides = {module: min(draft.linear_shapes[module]) for module in config.training.lora.target_modules}
    module = min(sides, key=lambda name: sides[name])
    if rank > sides[module]:
        rows, columns = draft.linear_shapes[module]
        raise MemoryPlanError(
            f"training.lora.rank = {rank} is too high for {module}, {rows} by {columns} in the draft",
            remedy=f"Set it to {sides[module]} or less, or drop {module} from the target_modules.",
        )
