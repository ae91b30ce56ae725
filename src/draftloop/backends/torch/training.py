"""LoRA training on PyTorch: a step, a replay, a state to resume from.

Contract: `backends/training.py`. Base weights stay as the checkpoint has them (4 bits); adapter, gradients
and Adam are float32, products run in the activation dtype. Logits exist for a chunk of response rows at a
time. Must not know where examples come from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from draftloop.backends.torch.adam import AdamLora
from draftloop.backends.torch.adapter import require_fit
from draftloop.backends.torch.frozen import load_frozen
from draftloop.backends.torch.learner import Learner
from draftloop.backends.torch.memory import memory_errors
from draftloop.backends.torch.objectives import HeadLoss, loss_rows_of
from draftloop.backends.torch.packing import packed_tokens
from draftloop.backends.torch.replay import row_alphas, rows_of
from draftloop.backends.training import Example, StepResult, TrainerSettings, TrainerState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.lora import Lora
    from draftloop.backends.torch.weights import WeightLoader

_PACKED_TOKENS = {"cpu": 768, "cuda": 2048}
"""Smaller microbatches are read together up to so many tokens, what they begin with alike counted once:
making the base dense costs as much as multiplying some 150 rows (measured on a CPU), so reading few tokens
at a time is a waste."""
_REPLAY_ROWS = 64
"""Rows whose float32 logits are in memory at once."""
_REMEDY = (
    "Lower training.batch_size or training.max_sequence_length, or set memory.gradient_checkpointing: true."
)


def open_trainer(loader: WeightLoader, lora: Lora, settings: TrainerSettings) -> TorchTrainer:
    """A trainer on the loader's folder that starts from `lora`.

    Raises:
        ModelUnreadable: the folder is damaged, or the adapter's modules or shapes are not this model's.
        OutOfMemory: naming the settings to lower.
    """
    require_fit(loader.architecture, lora)
    # Tensors made in inference mode could not take part in a backward pass.
    with memory_errors("opening the draft for training", _REMEDY), torch.no_grad():
        return TorchTrainer(loader, lora, settings)


class TorchTrainer:
    """See `Trainer`."""

    def __init__(self, loader: WeightLoader, lora: Lora, settings: TrainerSettings) -> None:
        base = load_frozen(loader, settings.pause)
        self._settings = settings
        self._device = loader.device
        self._adam = AdamLora(lora, loader.device)
        self._learner = Learner(loader.architecture, base, self._adam.leaves, lora.spec.scale)
        self._head = base.head
        self._loss = HeadLoss(base.head, settings.objective)

    def step(self, microbatches: Sequence[Sequence[Example]], learning_rate: float) -> StepResult:
        """See `Trainer`."""
        packs = list(_packs(microbatches, _PACKED_TOKENS[self._device.type]))
        examples = [example for pack in packs for example in pack]
        rows = sum(example.num_rows for example in examples)
        # The last token of a text is not read: nothing is predicted from it.
        tokens = sum(len(example.tokens) - 1 for example in examples)
        self._adam.zero_gradients()
        with memory_errors("training", _REMEDY):
            losses = [self._accumulate(pack, rows) for pack in packs]
            norm = float(self._adam.gradient_norm())
            loss = float(torch.stack(losses).sum()) / rows if rows else math.nan
            applied = math.isfinite(norm) and math.isfinite(loss)
            if applied:
                cut = self._settings.max_gradient_norm
                self._adam.step(learning_rate, cut / norm if norm > cut else 1.0)
        return StepResult(loss=loss, gradient_norm=norm, applied=applied, rows=rows, tokens=tokens)

    def replay(self, batch: Sequence[Example]) -> list[NDArray[np.float32]]:
        """See `Trainer`."""
        with memory_errors("measuring the draft", _REMEDY), torch.no_grad():
            packs = _packs([[example] for example in batch], _PACKED_TOKENS[self._device.type])
            found = (alphas for pack in packs for alphas in self._replay(pack))
            return [next(found) if example.num_rows else np.empty(0, np.float32) for example in batch]

    def state(self) -> TrainerState:
        """See `Trainer`."""
        return self._adam.state()

    def restore(self, state: TrainerState) -> None:
        """See `Trainer`.

        Raises:
            ValueError: the state is of another adapter.
        """
        with torch.no_grad():
            self._adam.restore(state)

    def _accumulate(self, pack: Sequence[Example], total_rows: int) -> torch.Tensor:
        """Add the pack's share of the gradient; the sum of its rows' losses."""
        texts = self._learner.pack(pack)
        hidden = self._learner.hidden(texts, checkpointed=self._settings.gradient_checkpointing)
        with torch.no_grad():
            known = loss_rows_of(self._settings.objective, pack, self._device)
            loss, gradient = self._loss(hidden.detach(), known)
        hidden.backward(gradient.div_(total_rows).to(hidden.dtype))
        return loss

    def _replay(self, pack: Sequence[Example]) -> Iterator[NDArray[np.float32]]:
        hidden = self._learner.hidden(self._learner.pack(pack), checkpointed=False)
        spans, first = [], 0
        for example in pack:
            spans.append((example, rows_of(example, self._device), first))
            first += example.num_rows
        parts: list[list[torch.Tensor]] = [[] for _ in pack]
        # The head is made dense once for a whole chunk, whose logits are warped few rows at a time.
        step = self._loss.chunk_rows(hidden)
        for start in range(0, len(hidden), step):
            logits = self._head.logits(hidden[start : start + step], self._head.vocab_size)
            for part, (example, rows, first) in zip(parts, spans, strict=True):
                stop = min(first + example.num_rows, start + len(logits))
                for row in range(max(first, start), stop, _REPLAY_ROWS):
                    few = logits[row - start : min(row + _REPLAY_ROWS, stop) - start].float()
                    part.append(row_alphas(few, rows, example, row - first))
        for part in parts:
            alphas: NDArray[np.float32] = torch.cat(part).cpu().numpy()
            yield alphas


def _packs(microbatches: Sequence[Sequence[Example]], max_tokens: int) -> Iterator[list[Example]]:
    """Neighbouring microbatches together while they have at most `max_tokens`; a larger one by itself."""
    pack: list[Example] = []
    for microbatch in microbatches:
        # An example without rows teaches nothing.
        examples = [example for example in microbatch if example.num_rows]
        if pack and packed_tokens((*pack, *examples)) > max_tokens:
            yield pack
            pack = []
        pack += examples
    if pack:
        yield pack
