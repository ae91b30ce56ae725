"""An adapter's weights as one flat float32 vector, and Adam on it.

Contract: leaves of autograd are views of the vector, and so are their gradients; a step is a dozen vector
operations whatever the number of modules. Must not know a model or a loss.

Source: Kingma and Ba 2015, "Adam", without weight decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from draftloop.backends.lora import Lora, LoraModule
from draftloop.backends.training import TrainerState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_PARTS = ("a", "b")


class AdamLora:
    """A LoRA that learns.

    Args:
        lora: where it begins.
        device: where it lives.
    """

    def __init__(self, lora: Lora, device: torch.device) -> None:
        self._spec = lora.spec
        self._shapes = {
            (name, part): getattr(module, part).shape
            for name, module in lora.modules.items()
            for part in _PARTS
        }
        self._steps = 0
        size = sum(int(np.prod(shape)) for shape in self._shapes.values())
        self._weights, self._gradients, self._m, self._v = torch.zeros(4, size, device=device)
        views = zip(self._views(self._weights), self._views(self._gradients), strict=True)
        leaves = {}
        for (key, weight), (_, gradient) in views:
            leaves[key] = weight.requires_grad_()
            leaves[key].grad = gradient
        self.leaves = {name: (leaves[name, "a"], leaves[name, "b"]) for name in lora.modules}
        self._write(self._weights, _tensors_of(lora))

    def zero_gradients(self) -> None:
        """Forget what was accumulated."""
        self._gradients.zero_()

    def gradient_norm(self) -> torch.Tensor:
        """Length of the accumulated gradient, a scalar on the device."""
        norm: torch.Tensor = torch.linalg.vector_norm(self._gradients)
        return norm

    def step(self, learning_rate: float, gradient_scale: float) -> None:
        """Move by the accumulated gradient times `gradient_scale`."""
        self._steps += 1
        g = self._gradients.mul_(gradient_scale)
        self._m.lerp_(g, 1 - _BETA1)
        self._v.mul_(_BETA2).addcmul_(g, g, value=1 - _BETA2)
        spread = (self._v / (1 - _BETA2**self._steps)).sqrt_().add_(_EPSILON)
        self._weights.addcdiv_(self._m, spread, value=-learning_rate / (1 - _BETA1**self._steps))

    def state(self) -> TrainerState:
        """A copy on the host."""
        weights = dict(self._arrays(self._weights))
        modules = {name: LoraModule(weights[name, "a"], weights[name, "b"]) for name in self.leaves}
        moments = {
            f"{name}.{part}.{kind}": array
            for kind, flat in (("m", self._m), ("v", self._v))
            for (name, part), array in self._arrays(flat)
        }
        return TrainerState(Lora(self._spec, modules), moments, self._steps)

    def restore(self, state: TrainerState) -> None:
        """Take over `state`.

        Raises:
            ValueError: its modules or shapes are others.
        """
        weights = _tensors_of(state.lora)
        moments = {
            kind: {key: state.moments[f"{key[0]}.{key[1]}.{kind}"] for key in weights} for kind in ("m", "v")
        }
        for tensors in (weights, *moments.values()):
            if {key: value.shape for key, value in tensors.items()} != self._shapes:
                raise ValueError("the state is of an adapter with other modules or shapes")
        self._write(self._weights, weights)
        self._write(self._m, moments["m"])
        self._write(self._v, moments["v"])
        self._steps = state.steps

    def _views(self, flat: torch.Tensor) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
        start = 0
        for key, shape in self._shapes.items():
            size = int(np.prod(shape))
            yield key, flat[start : start + size].view(shape).detach()
            start += size

    def _arrays(self, flat: torch.Tensor) -> Iterator[tuple[tuple[str, str], NDArray[np.float32]]]:
        for key, view in self._views(flat):
            yield key, view.cpu().numpy().copy()

    def _write(self, flat: torch.Tensor, values: dict[tuple[str, str], NDArray[np.float32]]) -> None:
        for key, view in self._views(flat):
            view.copy_(torch.tensor(values[key], dtype=torch.float32))


def _tensors_of(lora: Lora) -> dict[tuple[str, str], NDArray[np.float32]]:
    return {(name, part): getattr(module, part) for name, module in lora.modules.items() for part in _PARTS}
