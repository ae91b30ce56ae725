"""Toys that can learn: a pair whose draft lacks what a LoRA can give it, and requests that it answered.

Contract: everything goes through public interfaces. Answers come from the NumPy backend, the fastest for
toys; learning runs on PyTorch on the CPU. Names of models are relative to the classroom's folder, which is
the current one, so that the held-out split, a hash of names, is the same in each run. Costs of rounds are
given, not measured (`steady_costs`), so that no verdict depends on how busy the machine is.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

import toys
from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import Lora, LoraModule, LoraSpec, new_lora
from draftloop.config import load_config
from draftloop.engine import Request
from draftloop.learning.deployment import adapter_folder
from draftloop.learning.recorder import Provenance
from draftloop.loading import load_prepared, open_school, open_storage, pair_of, prepare, prepare_draft
from draftloop.models.adapter_files import write_adapter
from draftloop.storage.records import AdapterRecord, AdapterStatus
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import pytest

    from draftloop.config import Config
    from draftloop.engine import Engine
    from draftloop.learning.circle import School
    from draftloop.storage.records import PairKey, RunPoint
    from draftloop.storage.store import Store

SETTINGS: dict[str, object] = {
    "models.target.name": "./target",
    "models.draft.name": "./draft",
    "backend": "torch",
    "device": "cpu",
    "storage.directory": "data",
    "speculative.temperature": 1,
    "speculative.top_p": 1,
    "speculative.num_draft_tokens": 3,
    "speculative.schedule": "fixed",
    "speculative.acceptance_threshold": 1,
    "training.learning_rate": 3e-2,
    "training.num_epochs": 6,
    "training.warmup_steps": 2,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.min_failure_cases": 8,
    "training.lora.rank": 2,
    "training.lora.target_modules": "[down_proj]",
    "generation.max_tokens": 20,
    "generation.min_tokens": 20,
    "memory.gradient_checkpointing": "false",
    "adaptation.auto_train": "false",
}
"""A toy draft learns most of what it lacks with these, in about a second."""

REQUESTS = 50
DOMAIN = "toys"


@dataclass(frozen=True, slots=True)
class Classroom:
    """A folder with `target`, `draft` and the store `data`; the current folder."""

    folder: Path

    def overrides(self, **changes: object) -> list[str]:
        """`KEY=VALUE` for each setting; two underscores stand for a dot."""
        values = {**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}}
        return [f"{key}={value}" for key, value in values.items()]

    def options(self, **changes: object) -> list[str]:
        """The same as global options of the command line."""
        return [word for override in self.overrides(**changes) for word in ("--set", override)]

    def config(self, **changes: object) -> Config:
        """The same as settings."""
        return load_config(overrides=self.overrides(**changes)).config

    def store(self, **changes: object) -> Store:
        """The store, open."""
        return open_storage(self.config(**changes))

    @property
    def pair(self) -> PairKey:
        """Its key in the store."""
        return pair_of(self.config())

    @property
    def data(self) -> Path:
        """`storage.directory`."""
        return self.folder / "data"

    def school(self, store: Store, **changes: object) -> School:
        """Where the draft learns."""
        config = self.config(**changes)
        return open_school(config, prepare_draft(config), store)

    def engine(self, store: Store | None, backend: str = "numpy", **changes: object) -> Engine:
        """The pair; its answers are stored, and it wears the active adapter."""
        config = self.config(backend=backend, **changes)
        return load_prepared(config, prepare(config), store)


class Elsewhere(Classroom):
    """The models of the current folder, and a store of its own below `folder`."""

    def overrides(self, **changes: object) -> list[str]:
        """See `Classroom`."""
        return super().overrides(**{"storage__directory": self.data, **changes})


def ask(engine: Engine, seeds: Iterable[int], *, domain: str = DOMAIN, temperature: float = 1.0) -> list[Any]:
    """One stored answer for each seed, which makes its prompt; the completions."""
    return [engine.complete(question(seed, domain=domain, temperature=temperature)) for seed in seeds]


def question(seed: int, *, domain: str = DOMAIN, temperature: float = 1.0) -> Request:
    """A request whose answer is stored."""
    return Request(
        prompt_tokens=np.random.default_rng(seed).integers(0, 200, 8).tolist(),
        sampling=Sampling(temperature=temperature),
        max_tokens=20,
        min_tokens=20,
        num_draft_tokens=3,
        seed=seed,
        provenance=Provenance(domain, "collect"),
    )


def write_pupil(folder: Path, **options: Any) -> None:
    """Write `folder/target` and `folder/draft`, which lacks one direction of its `down_proj`: rank 1.

    Args:
        folder: where both go.
        **options: fields of `toys.Toy`.
    """
    toys.write_toy_folder(folder / "target", **{"num_layers": 1, **options})
    shutil.copytree(folder / "target", folder / "draft")
    path, random = folder / "draft" / "model.safetensors", np.random.default_rng(1)
    tensors = load_file(path)
    for name, weight in tensors.items():
        if name.endswith("down_proj.weight"):
            direction = np.outer(*(random.standard_normal(side) for side in weight.shape))
            size = np.linalg.norm(weight) / np.linalg.norm(direction)
            tensors[name] = weight + (size * direction).astype(np.float32)
    save_file(tensors, path, {"format": "mlx"})


def furnish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Classroom:
    """A classroom in `folder`, where `REQUESTS` were answered; the current folder from now on."""
    write_pupil(folder)
    monkeypatch.chdir(folder)
    room = Classroom(folder)
    with room.store() as store:
        ask(room.engine(store), range(REQUESTS))
    return room


def add_adapter(
    room: Classroom, store: Store, name: str, *, parent: str | None = None, confused: bool = False
) -> None:
    """Add an adapter that changes nothing, or that confuses the draft. It is not active by that."""
    draft = room.folder / "draft"
    fresh = new_lora(read_architecture(draft), LoraSpec(4, 64.0, ("q_proj", "down_proj")), 0)
    random = np.random.default_rng(0)
    modules = {
        key: LoraModule(one.a, random.standard_normal(one.b.shape).astype(np.float32) if confused else one.b)
        for key, one in fresh.modules.items()
    }
    folder = adapter_folder(room.data, name)
    folder.parent.mkdir(exist_ok=True)
    write_adapter(folder, Lora(fresh.spec, modules), base_model="./draft", facts={})
    status = AdapterStatus.IMPORTED
    store.adapters.add(AdapterRecord(name, room.pair, parent, 0.0, status, "unfused", None, "new", {}))


class Watched:
    """A watcher that remembers what it was told."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.notes: list[str] = []
        self.points: list[RunPoint] = []
        self.plans: list[tuple[int, int]] = []
        self.to_judge = self.compared = 0
        self.judged_share = 0.0
        self._at_step = at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def planned(self, total_steps: int, steps_done: int) -> None:
        self.plans.append((total_steps, steps_done))

    def point(self, point: RunPoint) -> None:
        self.points.append(point)
        self._at_step(point.step)

    def judging(self, held_out: int, compared: int) -> None:
        self.to_judge, self.compared = held_out, compared

    def judged(self, share: float) -> None:
        self.judged_share += share

    @property
    def alphas(self) -> list[float]:
        """Validation alpha, from before the first step on."""
        return [one.validation_alpha for one in self.points if one.validation_alpha is not None]


def steady_costs(monkeypatch: pytest.MonkeyPatch, draft_s: float = 0.001) -> None:
    """A drafted token costs the same in every outfit."""

    def seconds(draft: object, outfits: Sequence[object], *how: object) -> list[list[float]]:
        return [[draft_s] for _ in outfits]

    monkeypatch.setattr("draftloop.learning.forms.interleaved_draft_seconds", seconds)
