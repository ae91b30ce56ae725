"""Where a training run starts: from the active adapter, so that a second training keeps the first.

Contract: the start computes what the active adapter computes, exactly, wherever the new shape can hold it.
Must not know a backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.lora import Lora, LoraModule, new_lora

if TYPE_CHECKING:
    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import LoraSpec


def starting_point(architecture: Architecture, spec: LoraSpec, active: Lora | None, seed: int) -> Lora:
    """A LoRA of the shape `spec` that begins where `active` stands; fresh where there is none.

    A wider rank, more modules and another alpha keep the update to the bit of float32: new rows of A meet
    zero columns of B. A narrower rank keeps its best approximation (truncated SVD; Eckart and Young 1936).
    Modules that `spec` leaves out are given up.
    """
    fresh = new_lora(architecture, spec, seed)
    if active is None:
        return fresh
    return Lora(
        spec,
        {
            name: _continued(module, active.modules[name], active.spec.scale / spec.scale)
            if name in active.modules
            else module
            for name, module in fresh.modules.items()
        },
    )


def dropped_modules(spec: LoraSpec, active: Lora | None) -> tuple[str, ...]:
    """The kinds of modules that `active` adapts and `spec` does not."""
    kinds = {name.rpartition(".")[2] for name in active.modules} if active else set()
    return tuple(sorted(kinds - set(spec.target_modules)))


def _continued(fresh: LoraModule, old: LoraModule, scale_ratio: float) -> LoraModule:
    rank, old_rank = len(fresh.a), len(old.a)
    b = old.b * np.float32(scale_ratio)
    if old_rank <= rank:
        a = np.concatenate([old.a, fresh.a[old_rank:]])
        padded = np.zeros((len(b), rank), np.float32)
        padded[:, :old_rank] = b
        return LoraModule(a, padded)
    # B A = Q_b (R_b R_aᵀ) Q_aᵀ: the small product's SVD is that of the whole.
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(old.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(s[:rank])
    return LoraModule(
        ((root[:, None] * vt[:rank]) @ q_a.T).astype(np.float32),
        (q_b @ (u[:, :rank] * root)).astype(np.float32),
    )
