"""The seam between learning and a backend: what the trainer and the gate need of a model.

Contract: an `Example` holds the target's distribution already warped, so no backend needs the target. The
core owns data order, learning rate and stopping; a backend owns forward, backward and Adam. A backend must
not know where examples come from.

Letters: T tokens of an example, P of them the prompt, R = T - P response rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.backends.lora import Lora
    from draftloop.types import Rules


class Objective(StrEnum):
    """What training minimizes, per response row; `backends/numpy/objectives.py` is the reference."""

    LK_HYBRID = "lk_hybrid"
    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    TOTAL_VARIATION = "total_variation"
    CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One request as the draft learns from it and is measured on it.

    Row i tells of token tokens[P + i], which the logits at position P + i - 1 predict.

    Attributes:
        tokens: [T] int32, the prompt and the answer.
        num_prompt_tokens: P >= 1.
        top_ids: [R, N] int32, the target's most likely tokens (N <= 32); distinct within a row.
        top_probs: [R, N] float32, p of them, warped as the request was served; greedy requests keep p at
            temperature 1, because a point mass teaches nothing of the rest.
        tail_probs: [R] float32, p of everything else: top_probs.sum(-1) + tail_probs = 1.
        rules: warping and masks of the rows, as the request was served.
    """

    tokens: NDArray[np.int32]
    num_prompt_tokens: int
    top_ids: NDArray[np.int32]
    top_probs: NDArray[np.float32]
    tail_probs: NDArray[np.float32]
    rules: Rules

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def loss_temperature(self) -> float:
        """What the draft's logits are divided by in the loss: the request's temperature; 1 where greedy."""
        sampling = self.rules.sampling
        return 1.0 if sampling.greedy else sampling.temperature


def go_on() -> None:
    """A pause of no length."""


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """What a trainer is told once.

    Attributes:
        objective: the loss.
        gradient_checkpointing: keep only each layer's input and compute the rest again: less memory.
        max_gradient_norm: a longer gradient is cut to this length.
        pause: called again and again while a step or a replay is computed, as often as the framework can
            stop in between; it may take its time, so that others can have the processors meanwhile.
    """

    objective: Objective
    gradient_checkpointing: bool
    max_gradient_norm: float = 1.0
    pause: Callable[[], None] = go_on


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean over the step's rows.
        gradient_norm: before cutting; NaN or infinite where the step was skipped.
        applied: False where the gradient was not finite: weights and Adam are as before.
        rows: response rows that counted.
        tokens: tokens that were read.
    """

    loss: float
    gradient_norm: float
    applied: bool
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class TrainerState:
    """Everything that a resumed run needs of the trainer.

    Attributes:
        lora: the weights, float32.
        moments: Adam's: `<module>.a.m`, `.a.v`, `.b.m`, `.b.v` float32, shaped like the weights.
        steps: applied so far (Adam's bias correction).
    """

    lora: Lora
    moments: Mapping[str, NDArray[np.float32]]
    steps: int


class Trainer(Protocol):
    """A draft whose base is frozen, in 4 bits where the checkpoint is, and a LoRA that learns (float32)."""

    def step(self, microbatches: Sequence[Sequence[Example]], learning_rate: float) -> StepResult:
        """One Adam step (beta 0.9 and 0.999, eps 1e-8, no decay) on the mean loss over all rows.

        Each microbatch is in memory at once; their gradients add up.

        Raises:
            OutOfMemory: naming the settings to lower.
        """
        ...

    def replay(self, batch: Sequence[Example]) -> list[NDArray[np.float32]]:
        """As `Model.replay`, with the weights as they are now."""
        ...

    def state(self) -> TrainerState:
        """A copy on the host."""
        ...

    def restore(self, state: TrainerState) -> None:
        """Go on from `state`, which has this trainer's modules and shapes."""
        ...
