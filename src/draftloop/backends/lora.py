"""LoRA as every backend sees it: its shape, its weights on the host, and the forms it can be deployed in.

Contract: plain data and shape arithmetic on NumPy arrays. A module's name is that of its weight in the
checkpoint without `.weight` ("model.layers.0.self_attn.q_proj"). Must not know files or any framework.

Source: Hu et al. 2021, "LoRA": y = W x + (alpha / rank) · B A x.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.architecture import tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture


class AdapterForm(StrEnum):
    """How an adapter is deployed: beside its modules, or added into them at some precision."""

    UNFUSED = "unfused"
    """Two small products beside each adapted module; the base stays as it is."""
    FUSED16 = "fused16"
    """Adapted modules are dense, in the activation dtype."""
    FUSED8 = "fused8"
    """Adapted modules are quantized to 8 bits."""
    FUSED4 = "fused4"
    """Adapted modules are quantized to 4 bits again, in the checkpoint's groups."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The adapter's shape.

    Attributes:
        rank: r.
        alpha: the update is scaled by alpha / rank.
        target_modules: `q_proj`, …, `down_proj`: which linear modules of each layer are adapted.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the update: alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """One adapted module. a: [r, in] float32; b: [out, r] float32."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """An adapter's weights, by module name, in the checkpoint's order."""

    spec: LoraSpec
    modules: Mapping[str, LoraModule]


def adapted_modules(
    architecture: Architecture, target_modules: Sequence[str]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and [out, in] of each module that an adapter of `target_modules` has weights for."""
    for tensor, shape in tensor_shapes(architecture).items():
        name = tensor.removesuffix(".weight")
        if name.rpartition(".")[2] in target_modules and tensor.endswith(".weight"):
            yield name, (shape[0], shape[1])


def new_lora(architecture: Architecture, spec: LoraSpec, seed: int) -> Lora:
    """A fresh adapter that changes nothing: A uniform in ±1/√in (as PEFT begins), B zero."""
    random = np.random.Generator(np.random.PCG64(seed))
    modules = {}
    for name, (rows, columns) in adapted_modules(architecture, spec.target_modules):
        bound = columns**-0.5
        a = random.uniform(-bound, bound, (spec.rank, columns)).astype(np.float32)
        modules[name] = LoraModule(a, np.zeros((rows, spec.rank), np.float32))
    return Lora(spec, modules)
