"""A LoRA on the reference decoder: checked, then beside its modules or added into copies of them.

Contract: `WornAdapter` is what one adapter changes; the decoder's own weights stay untouched. Must not know
how a forward pass runs.

Source: Hu et al. 2021, "LoRA": y = W x + (alpha / rank) · B A x.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from draftloop.backends.lora import AdapterForm, adapted_modules
from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import Lora

    Floats = NDArray[np.floating]

FORMS = (AdapterForm.UNFUSED, AdapterForm.FUSED16)
"""`fused16` is dense in the activation dtype, which is float32 here."""


@dataclass(frozen=True, slots=True, eq=False)
class WornAdapter:
    """What an adapter changes, by module name.

    Attributes:
        beside: A [r, in] and alpha / rank · B [out, r] of modules that keep their weight.
        fused: weights [out, in] that stand in for the checkpoint's.
    """

    beside: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    fused: Mapping[str, Floats] = field(default_factory=dict)


NO_ADAPTER = WornAdapter()


def wear(
    architecture: Architecture, weights: Mapping[str, Floats], lora: Lora | None, form: AdapterForm
) -> WornAdapter:
    """Make `lora` ready for a decoder with `weights`, in their dtype; None is no adapter.

    Raises:
        ModelUnreadable: the adapter's modules or shapes are not this model's.
        ValueError: a form that is not among `FORMS`.
    """
    if lora is None:
        return NO_ADAPTER
    if form not in FORMS:
        raise ValueError(f"the numpy backend has no form {form}")
    _check_fits(architecture, lora)
    beside: dict[str, tuple[Floats, Floats]] = {}
    for name, module in lora.modules.items():
        dtype = weights[f"{name}.weight"].dtype
        beside[name] = module.a.astype(dtype), (module.b * lora.spec.scale).astype(dtype)
    if form is AdapterForm.UNFUSED:
        return WornAdapter(beside=beside)
    return WornAdapter(fused={name: weights[f"{name}.weight"] + b @ a for name, (a, b) in beside.items()})


def _check_fits(architecture: Architecture, lora: Lora) -> None:
    remedy = "Choose an adapter that was trained on this very draft."
    shapes = dict(adapted_modules(architecture, tuple(architecture.linear_shapes)))
    for name, module in lora.modules.items():
        if name not in shapes:
            raise ModelUnreadable(f"the adapter is for {name}, which this model lacks", remedy=remedy)
        rows, columns = shapes[name]
        wanted = (lora.spec.rank, columns), (rows, lora.spec.rank)
        if (module.a.shape, module.b.shape) != wanted:
            raise ModelUnreadable(
                f"the adapter's A and B of {name} are {list(module.a.shape)} and {list(module.b.shape)}, "
                f"this model at rank {lora.spec.rank} needs {list(wanted[0])} and {list(wanted[1])}",
                remedy=remedy,
            )
