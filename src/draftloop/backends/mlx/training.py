"""`MlxTrainer`: LoRA on an mlx-lm model behind `Trainer` of `backends/training.py`.

Contract: the base stays as it was loaded (4 bits where the checkpoint has 4 bits); weights and Adam of the
LoRA are float32, its products are in the activations' dtype. Each example is computed alone, so nothing is
padded. Must not know where examples come from, nor data order, learning rates or stopping.

Memory: the head's logits exist for a few rows at a time, and with gradient checkpointing each layer keeps
only its input. Sources: Hu et al. 2021 (LoRA); Chen et al. 2016 (gradient checkpointing); Kingma and Ba
2015, "Adam", Algorithm 1.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask

from draftloop.backends.lora import AdapterForm, Lora, LoraModule
from draftloop.backends.mlx.adapter import Adapters, activation_dtype, low_rank_pair
from draftloop.backends.mlx.memory import memory_errors
from draftloop.backends.mlx.objectives import losses_and_gradients, targets
from draftloop.backends.mlx.replay import head_of, read_tokens, replay, row_chunks
from draftloop.backends.training import StepResult, TrainerState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.training import Example, TrainerSettings

    Weights = dict[str, mx.array]

_BETAS = 0.9, 0.999
_ADAM_EPSILON = 1e-8
_MEMORY_REMEDY = (
    "Lower training.batch_size or training.max_sequence_length, or set memory.gradient_checkpointing: true."
)


class MlxTrainer:
    """A frozen model and a LoRA that learns.

    Args:
        architecture: the model's shapes.
        network: mlx-lm's module, for this trainer alone: its adapted modules are replaced.
        lora: where to start.
        settings: told once.
        device: where to run.

    Raises:
        ModelUnreadable: `lora` does not fit the model.
    """

    def __init__(
        self,
        architecture: Architecture,
        network: Any,
        lora: Lora,
        settings: TrainerSettings,
        device: mx.Device,
    ) -> None:
        self._architecture = architecture
        self._network = network
        self._spec = lora.spec
        self._settings = settings
        self._device = device
        adapters = Adapters(architecture, network)
        with mx.stream(device):
            adapters.wear(lora, AdapterForm.UNFUSED)
            self._modules = {name: adapters.worn(name) for name in lora.modules}
            self._dtypes = {name: activation_dtype(module.base) for name, module in self._modules.items()}
            self._weights = _on_device(lora)
            self._moments = {
                f"{key}.{moment}": mx.zeros_like(weight)
                for key, weight in self._weights.items()
                for moment in ("m", "v")
            }
            mx.eval(self._weights, self._moments)
        self._steps = 0

    def step(self, microbatches: Sequence[Sequence[Example]], learning_rate: float) -> StepResult:
        """One Adam step on the mean loss over all rows; see `Trainer.step`."""
        examples = [example for microbatch in microbatches for example in microbatch if example.num_rows]
        rows = sum(example.num_rows for example in examples)
        with mx.stream(self._device), memory_errors("training", _MEMORY_REMEDY):
            try:
                loss, gradients = self._mean(examples, rows)
                norm = float(mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.array(0.0))))
                applied = rows > 0 and math.isfinite(loss) and math.isfinite(norm)
                if applied:
                    self._adam(
                        gradients,
                        min(1.0, self._settings.max_gradient_norm / max(norm, 1e-30)),
                        learning_rate,
                    )
            finally:
                # The modules still hold what the gradient was traced with: lazy, and before this step.
                self._put_on(self._weights)
                # Every example has its own length: buffers of one rarely suit the next.
                mx.clear_cache()
        tokens = sum(len(example.tokens) - 1 for example in examples)
        return StepResult(loss, norm, applied, rows, tokens)

    def replay(self, batch: Sequence[Example]) -> list[NDArray[np.float32]]:
        """Alpha at each response row with the weights as they are now."""
        with mx.stream(self._device), memory_errors("measuring the draft", _MEMORY_REMEDY):
            return [self._replay(example) for example in batch]

    def state(self) -> TrainerState:
        """A copy on the host."""
        modules = {
            name: LoraModule(np.array(self._weights[f"{name}.a"]), np.array(self._weights[f"{name}.b"]))
            for name in self._modules
        }
        moments = {name: np.array(array) for name, array in self._moments.items()}
        return TrainerState(Lora(self._spec, modules), moments, self._steps)

    def restore(self, state: TrainerState) -> None:
        """Go on from `state`."""
        with mx.stream(self._device):
            self._weights = _on_device(state.lora)
            self._moments = {name: mx.array(state.moments[name]) for name in self._moments}
            self._steps = state.steps
            mx.eval(self._weights, self._moments)
            self._put_on(self._weights)

    def _replay(self, example: Example) -> NDArray[np.float32]:
        self._settings.pause()
        return replay(self._network, self._architecture, example)

    def _mean(self, examples: Sequence[Example], rows: int) -> tuple[float, Weights]:
        """Mean loss over all rows and its gradient."""
        gradients = {key: mx.zeros_like(weight) for key, weight in self._weights.items()}
        loss = 0.0
        for example in examples:
            differentiate = mx.value_and_grad(partial(self._surrogate, example))
            (_, total), more = differentiate(self._weights)
            gradients = {key: gradient + more[key] / rows for key, gradient in gradients.items()}
            self._evaluate(total, gradients)
            loss += float(total) / rows
        return loss, gradients

    def _evaluate(self, total: mx.array, gradients: Weights) -> None:
        """One layer after the other, as the backward pass reaches them, with a pause before each."""
        # The loss belongs to the first: what it is summed from would be kept until it is there.
        wanted = [total]
        for i in reversed(range(self._architecture.num_layers)):
            wanted += [gradients[key] for key in gradients if key.startswith(f"model.layers.{i}.")]
            self._settings.pause()
            mx.eval(wanted)
            wanted = []

    def _surrogate(self, example: Example, weights: Weights) -> tuple[mx.array, mx.array]:
        """Something with the gradient of the example's summed loss, and that loss.

        hidden · (dL / dhidden), the second held constant, has the gradient of L. It is never evaluated
        itself; it lets the head go forth and back for a few rows at a time, and only once.
        """
        hidden = self._hidden(weights, example)
        constant = mx.stop_gradient(hidden)
        head = head_of(self._network, self._architecture)
        wanted = targets(self._settings.objective, example)
        total, slopes = mx.array(0.0), [mx.zeros((0, hidden.shape[1]), hidden.dtype)]
        for start, stop in row_chunks(example.num_rows):
            # One chunk after the other: side by side, all their logits would exist at once.
            chunk = mx.depends([constant[start:stop]], slopes[-1:])[0]
            losses, gradient = losses_and_gradients(
                self._settings.objective, head(chunk), wanted.rows(start, stop), example.loss_temperature
            )
            slopes.append(mx.vjp(lambda x: [head(x)], [chunk], [gradient.astype(hidden.dtype)])[1][0])
            total = total + losses.sum()
        return (hidden * mx.stop_gradient(mx.concatenate(slopes))).sum(), total

    def _hidden(self, weights: Weights, example: Example) -> mx.array:
        """Hidden states of the response rows, [R, D]."""
        body = self._network.model
        hidden = body.embed_tokens(read_tokens(example, self._architecture)[None])
        attention_mask = create_attention_mask(hidden)
        for i, layer in enumerate(body.layers):
            mine = {key: weights[key] for key in weights if key.startswith(f"model.layers.{i}.")}
            run = partial(self._run_layer, layer, attention_mask)
            # A layer without weights of the LoRA below it has no gradient to compute, and nothing is kept.
            hidden = (mx.checkpoint(run) if self._settings.gradient_checkpointing else run)(mine, hidden)
        rows: mx.array = body.norm(hidden)[0, example.num_prompt_tokens - 1 :]
        return rows

    def _run_layer(self, layer: Any, attention_mask: Any, weights: Weights, hidden: mx.array) -> mx.array:
        self._put_on(weights)
        output: mx.array = layer(hidden, attention_mask, None)
        return output

    def _put_on(self, weights: Weights) -> None:
        """Let the modules named in `weights` use them."""
        for key in weights:
            name, _, part = key.rpartition(".")
            if part == "a":
                module = self._modules[name]
                pair = weights[key], weights[f"{name}.b"]
                module.down, module.up = low_rank_pair(*pair, self._spec.scale, self._dtypes[name])

    def _adam(self, gradients: Weights, shrink: float, learning_rate: float) -> None:
        """Algorithm 1 on gradients times `shrink`."""
        steps = self._steps + 1
        rate = learning_rate / (1 - _BETAS[0] ** steps)
        correction = 1 / math.sqrt(1 - _BETAS[1] ** steps)
        weights, moments = {}, {}
        for key, raw in gradients.items():
            gradient = raw * shrink
            m = _BETAS[0] * self._moments[f"{key}.m"] + (1 - _BETAS[0]) * gradient
            v = _BETAS[1] * self._moments[f"{key}.v"] + (1 - _BETAS[1]) * mx.square(gradient)
            weights[key] = self._weights[key] - rate * m / (mx.sqrt(v) * correction + _ADAM_EPSILON)
            moments[f"{key}.m"], moments[f"{key}.v"] = m, v
        mx.eval(weights, moments)
        self._weights, self._moments, self._steps = weights, moments, steps


def _on_device(lora: Lora) -> Weights:
    """`<module>.a` and `<module>.b` of each module, float32."""
    return {
        f"{name}.{part}": mx.array(array)
        for name, module in lora.modules.items()
        for part, array in (("a", module.a), ("b", module.b))
    }
