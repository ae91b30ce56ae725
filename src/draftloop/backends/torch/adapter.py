"""A LoRA on a loaded decoder: beside its linear layers, or added into copies of them.

Contract: `deployed_layers` gives the layers that a decoder with the adapter multiplies with. The base's own
layers are never touched, and what an adapter leaves alone is shared with them. Must not know how a forward
pass goes.

Letters: r rank, R ranks of all adapted modules of a group together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from draftloop.backends.lora import AdapterForm, adapted_modules
from draftloop.backends.torch.linear import (
    AffineWeight,
    DenseLinear,
    Linear,
    dequantize,
    int4_linear,
    int8_linear,
)
from draftloop.backends.torch.native.linear import NativeInt4Linear
from draftloop.backends.torch.requantize import shifted
from draftloop.backends.torch.weights import layer_groups
from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import Lora
    from draftloop.backends.torch.weights import Layer, WeightLoader


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """base(x) + x · a · b: two small products whatever the number of modules.

    a: [in, R]; b: [R, out], scaled, with zeros where a module's rank meets another module's rows.
    """

    base: Linear
    a: torch.Tensor
    b: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return self.base(x).addmm_(x @ self.a, self.b)

    @property
    def num_bytes(self) -> int:
        """See `Linear`."""
        return self.base.num_bytes + self.a.nbytes + self.b.nbytes


def adapted_linear(base: Linear, a: torch.Tensor, b: torch.Tensor) -> Linear:
    """An adapter beside `base`, by the fastest kernels that its device has: a [in, R]; b [R, out], scaled."""
    native = base.with_adapter(a, b) if isinstance(base, NativeInt4Linear) else None
    return native or AdaptedLinear(base, a, b)


def adapter_forms(architecture: Architecture, device: torch.device) -> tuple[AdapterForm, ...]:
    """The forms that a model can deploy on this device. The 8-bit kernel is a CPU's."""
    if architecture.quantization is None:
        return (AdapterForm.UNFUSED, AdapterForm.FUSED16)
    if device.type == "cpu":
        return tuple(AdapterForm)
    return (AdapterForm.UNFUSED, AdapterForm.FUSED16, AdapterForm.FUSED4)


def require_fit(architecture: Architecture, lora: Lora) -> None:
    """Check that every module of `lora` is this model's and has its shape.

    Raises:
        ModelUnreadable: names the first one that does not.
    """
    remedy = "Choose an adapter that was trained on this very draft."
    shapes = dict(adapted_modules(architecture, tuple(architecture.linear_shapes)))
    for name, module in lora.modules.items():
        if name not in shapes:
            raise ModelUnreadable(f"the adapter changes {name}, which this model lacks", remedy=remedy)
        rows, columns = shapes[name]
        needed = (lora.spec.rank, columns), (rows, lora.spec.rank)
        if (module.a.shape, module.b.shape) != needed:
            raise ModelUnreadable(
                f"the adapter's A and B of {name} are {list(module.a.shape)} and {list(module.b.shape)}; "
                f"at rank {lora.spec.rank} this model needs {list(needed[0])} and {list(needed[1])}",
                remedy=remedy,
            )


def deployed_layers(
    base: Sequence[Layer], lora: Lora, form: AdapterForm, loader: WeightLoader
) -> tuple[Layer, ...]:
    """The decoder's layers with `lora` in `form`; raw rows are read again from the loader's folder.

    Raises:
        ModelUnreadable: the adapter's modules or shapes are not this model's.
        ValueError: a form that is not among `adapter_forms`.
    """
    if form not in adapter_forms(loader.architecture, loader.device):
        raise ValueError(f"form {form} is not available for this model on {loader.device.type}")
    require_fit(loader.architecture, lora)
    deployer = _Deployer(lora, form, loader)
    return tuple(deployer.layer(f"model.layers.{i}", layer) for i, layer in enumerate(base))


class _Deployer:
    def __init__(self, lora: Lora, form: AdapterForm, loader: WeightLoader) -> None:
        self._lora = lora
        self._form = form
        self._loader = loader

    def layer(self, prefix: str, base: Layer) -> Layer:
        changed: dict[str, Any] = {}
        for field, modules in layer_groups(prefix).items():
            if any(module in self._lora.modules for module in modules):
                linear: Linear = getattr(base, field)
                changed[field] = self._linear(linear, modules)
        return replace(base, **changed)

    def _linear(self, base: Linear, modules: tuple[str, ...]) -> Linear:
        loader, quantization = self._loader, self._loader.architecture.quantization
        if self._form is AdapterForm.UNFUSED:
            return self._beside(base, modules)
        bias = loader.bias(modules)
        if self._form is AdapterForm.FUSED4 and quantization is not None:
            parts = [self._affine(module) for module in modules]
            return int4_linear(parts, bias, quantization.group_size, loader.dtype, loader.device)
        rows = torch.cat([self._dense(module) for module in modules])
        if self._form is AdapterForm.FUSED8:
            return int8_linear(rows, bias, loader.dtype)
        return DenseLinear(rows.to(loader.dtype), bias)

    def _beside(self, base: Linear, modules: tuple[str, ...]) -> Linear:
        shapes = self._loader.architecture.linear_shapes
        outs = [shapes[module.rpartition(".")[2]][0] for module in modules]
        adapted = [name for name in modules if name in self._lora.modules]
        a = torch.cat([_host(self._lora.modules[name].a) for name in adapted])
        b = torch.zeros(len(a), sum(outs))
        rank, first_row = 0, 0
        for name, out in zip(modules, outs, strict=True):
            if name in self._lora.modules:
                step = self._lora.spec.rank
                b[rank : rank + step, first_row : first_row + out] = _host(self._lora.modules[name].b).T
                rank += step
            first_row += out
        a, b = (t.to(self._loader.device, self._loader.dtype) for t in (a.T, b * self._lora.spec.scale))
        return adapted_linear(base, a.contiguous(), b)

    def _delta(self, module: str) -> torch.Tensor | None:
        """What the adapter adds to the module's weight, [out, in] float32."""
        weights = self._lora.modules.get(module)
        return None if weights is None else _host(weights.b) @ _host(weights.a) * self._lora.spec.scale

    def _dense(self, module: str) -> torch.Tensor:
        """[out, in] float32, the adapter added."""
        if self._loader.architecture.quantization is None:
            rows = self._loader.tensors.dense(f"{module}.weight").to(self._loader.device, torch.float32)
        else:
            rows = dequantize(self._loader.affine(module), torch.float32)
        delta = self._delta(module)
        return rows if delta is None else rows + delta.to(rows.device)

    def _affine(self, module: str) -> AffineWeight:
        """The module's 4-bit rows, the adapter added."""
        weight, delta = self._loader.affine(module), self._delta(module)
        return weight if delta is None else shifted(weight, delta.to(self._loader.device))


def _host(values: NDArray[np.float32]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
