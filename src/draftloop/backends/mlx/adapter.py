"""A LoRA on an mlx-lm model: beside its linear modules, or added into copies of them.

Contract: `Adapters` swaps modules of one network and keeps the checkpoint's own aside, so that what it
takes away comes back to the bit. Must not know caches or where an adapter comes from.

Letters: r rank. Source: Hu et al. 2021, "LoRA": y = W x + (alpha / rank) · B A x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx.utils import tree_flatten

from draftloop.backends.lora import AdapterForm, adapted_modules
from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import Lora

_BITS = {AdapterForm.FUSED8: 8, AdapterForm.FUSED4: 4}


class LoraLinear(Module):
    """A linear module with a low-rank pair beside it.

    Two more kernels a call: mlx-lm's own layer takes four, in float32, which a draft's single token feels.

    Attributes:
        base: mlx-lm's linear module, dense or quantized.
        down: Aᵀ, [in, r].
        up: (alpha / rank) · Bᵀ, [r, out].
    """

    def __init__(self, base: Any, down: mx.array, up: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.base = base
        self.down = down
        self.up = up

    def __call__(self, x: mx.array) -> mx.array:
        """[…, in] → […, out]."""
        return mx.addmm(self.base(x), x @ self.down, self.up)


class Adapters:
    """What one network wears.

    Args:
        architecture: the network's shapes.
        network: mlx-lm's module, as it was loaded.
    """

    def __init__(self, architecture: Architecture, network: Any) -> None:
        self._architecture = architecture
        self._network = network
        self._base: dict[str, Any] = {}

    @property
    def forms(self) -> tuple[AdapterForm, ...]:
        """What `wear` takes: a dense checkpoint has no quantized modules to fuse into."""
        if self._architecture.quantization is None:
            return AdapterForm.UNFUSED, AdapterForm.FUSED16
        return tuple(AdapterForm)

    @property
    def num_bytes(self) -> int:
        """Bytes of the network's weights, of what it wears, and of what is kept aside."""
        kept = [self._network.parameters(), *(module.parameters() for module in self._base.values())]
        flat = cast("list[tuple[str, mx.array]]", tree_flatten(kept))
        return sum({id(array): array.nbytes for _, array in flat}.values())

    def wear(self, lora: Lora | None, form: AdapterForm) -> None:
        """Wear `lora` in place of what was worn; None takes it away.

        Raises:
            ModelUnreadable: the adapter's modules or shapes are not this model's; nothing has changed.
            ValueError: a form that is not among `forms`.
        """
        stand_ins: dict[str, Any] = {}
        if lora is not None:
            if form not in self.forms:
                raise ValueError(f"form {form} is not among {', '.join(self.forms)}")
            check_fits(self._architecture, lora)
            for name, module in lora.modules.items():
                base = self._base[name] if name in self._base else _module_at(self._network, name)
                pair = mx.array(module.a), mx.array(module.b)
                stand_ins[name] = _stand_in(base, pair, lora.spec.scale, form)
            # Another thread than this one may be the next to run the model.
            mx.eval([module.parameters() for module in stand_ins.values()])
        for name, base in self._base.items():
            _put_module(self._network, name, base)
        self._base = {name: _module_at(self._network, name) for name in stand_ins}
        for name, module in stand_ins.items():
            _put_module(self._network, name, module)

    def worn(self, name: str) -> LoraLinear:
        """The module `name`, which wears its part of an adapter unfused."""
        return cast("LoraLinear", _module_at(self._network, name))


def check_fits(architecture: Architecture, lora: Lora) -> None:
    """Refuse an adapter that is not this model's.

    Raises:
        ModelUnreadable: says which module, and what does not fit.
    """
    remedy = "Use an adapter that was trained on this draft."
    shapes = dict(adapted_modules(architecture, tuple(architecture.linear_shapes)))
    rank = lora.spec.rank
    for name, module in lora.modules.items():
        if name not in shapes:
            raise ModelUnreadable(f"the model has no module {name}, which the adapter changes", remedy=remedy)
        rows, columns = shapes[name]
        found, wanted = (module.a.shape, module.b.shape), ((rank, columns), (rows, rank))
        if found != wanted:
            raise ModelUnreadable(
                f"the adapter's A and B of {name} have shapes {found[0]} and {found[1]}; "
                f"rank {rank} needs {wanted[0]} and {wanted[1]} here",
                remedy=remedy,
            )


def low_rank_pair(a: mx.array, b: mx.array, scale: float, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """A [r, in] and B [out, r], float32 → `down` and `up` of `LoraLinear`, in the activations' dtype."""
    return a.T.astype(dtype), (scale * b).T.astype(dtype)


def activation_dtype(base: Any) -> mx.Dtype:
    """What a dense or quantized linear module computes in."""
    return cast("mx.Dtype", base["scales" if isinstance(base, QuantizedLinear) else "weight"].dtype)


def _stand_in(base: Any, pair: tuple[mx.array, mx.array], scale: float, form: AdapterForm) -> Any:
    dtype = activation_dtype(base)
    if form is AdapterForm.UNFUSED:
        return LoraLinear(base, *low_rank_pair(*pair, scale, dtype))
    a, b = pair
    fused = Linear(1, 1, bias=False)
    fused.weight = (_dense_weight(base) + scale * (b @ a)).astype(dtype)
    if "bias" in base:
        fused.bias = base.bias
    if form is AdapterForm.FUSED16:
        return fused
    return QuantizedLinear.from_linear(fused, base.group_size, _BITS[form])


def _dense_weight(base: Any) -> mx.array:
    """[out, in] float32."""
    if not isinstance(base, QuantizedLinear):
        return cast("mx.array", base.weight.astype(mx.float32))
    scales, biases = (base[part].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(base.weight, scales, biases, group_size=base.group_size, bits=base.bits)


def _module_at(network: Any, name: str) -> Any:
    """The module that the checkpoint calls `name`: mlx-lm's names are the same."""
    module = network
    for part in name.split("."):
        module = module[int(part)] if part.isdigit() else module[part]
    return module


def _put_module(network: Any, name: str, module: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(_module_at(network, parent), leaf, module)
