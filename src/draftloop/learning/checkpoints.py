"""A run's checkpoint on disk: all that a killed or stopped run needs to go on, to the bit.

Contract: the file is whole or absent; a new one takes the old one's place in one rename. Must not know how
training works.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from draftloop.backends.lora import Lora, LoraModule, LoraSpec
from draftloop.backends.training import TrainerState
from draftloop.errors import StorageError
from draftloop.models.cache import make_folder, new_file, storage_errors

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Tensors = dict[str, NDArray[np.float32]]

_FACTS = "facts"
_STATE, _BEST, _MOMENTS = "state.", "best.", "moments."


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A run after `steps_done` planned steps.

    Attributes:
        steps_done: planned steps behind it, skipped ones included.
        skipped_steps: of those, how many had no finite gradient.
        trained_s: seconds of training so far.
        state: the trainer's.
        best: the adapter with the highest validation alpha so far.
        best_alpha: that alpha; None where nothing validates.
        first_alpha: validation alpha before the first step; None where nothing validates.
    """

    steps_done: int
    skipped_steps: int
    trained_s: float
    state: TrainerState
    best: Lora
    best_alpha: float | None
    first_alpha: float | None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` as the file `path`, in place of an older one.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    state = checkpoint.state
    tensors = {
        **_named(_STATE, state.lora),
        **_named(_BEST, checkpoint.best),
        **{f"{_MOMENTS}{name}": values for name, values in state.moments.items()},
    }
    spec = state.lora.spec
    facts = {
        "steps_done": checkpoint.steps_done,
        "skipped_steps": checkpoint.skipped_steps,
        "trained_s": checkpoint.trained_s,
        "best_alpha": checkpoint.best_alpha,
        "first_alpha": checkpoint.first_alpha,
        "adam_steps": state.steps,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "target_modules": list(spec.target_modules),
        "modules": list(state.lora.modules),
    }
    make_folder(path.parent)
    with storage_errors(f"writing {path}"), new_file(path) as partial:
        partial.write_bytes(save(tensors, {_FACTS: json.dumps(facts)}))


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in the file `path`; None where there is none.

    Raises:
        StorageError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        facts, tensors = _read(path)
        spec = LoraSpec(facts["rank"], facts["alpha"], tuple(facts["target_modules"]))
        moments = {
            name.removeprefix(_MOMENTS): values
            for name, values in tensors.items()
            if name.startswith(_MOMENTS)
        }
        lora, best = (_lora(prefix, tensors, spec, facts["modules"]) for prefix in (_STATE, _BEST))
        return Checkpoint(
            steps_done=facts["steps_done"],
            skipped_steps=facts["skipped_steps"],
            trained_s=facts["trained_s"],
            state=TrainerState(lora, moments, facts["adam_steps"]),
            best=best,
            best_alpha=facts["best_alpha"],
            first_alpha=facts["first_alpha"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StorageError(
            f"the checkpoint {path} cannot be read ({error})",
            remedy="Train without --resume; nothing that was collected is lost.",
        ) from error


def remove_checkpoint(path: Path) -> None:
    """The run is over: nobody will go on with it.

    Raises:
        StorageError: the file cannot be removed.
    """
    with storage_errors(f"removing {path}"):
        path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    with safe_open(path, framework="numpy") as file:
        facts = json.loads((file.metadata() or {})[_FACTS])
        return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _named(prefix: str, lora: Lora) -> Tensors:
    return {
        f"{prefix}{name}.{side}": values
        for name, module in lora.modules.items()
        for side, values in (("a", module.a), ("b", module.b))
    }


def _lora(prefix: str, tensors: Tensors, spec: LoraSpec, names: list[str]) -> Lora:
    return Lora(
        spec,
        {name: LoraModule(tensors[f"{prefix}{name}.a"], tensors[f"{prefix}{name}.b"]) for name in names},
    )
