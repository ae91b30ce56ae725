"""What the commands stored, and adapters for them to wear."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import Lora, LoraModule, LoraSpec, adapted_modules
from draftloop.learning.deployment import adapter_folder
from draftloop.models.adapter_files import write_adapter
from draftloop.storage.records import AdapterRecord, AdapterStatus, PairKey
from draftloop.storage.store import Store, open_store

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.storage.records import RequestRecord


def opened(directory: Path) -> Store:
    """The store in `directory`, as large as one likes."""
    return open_store(directory, max_megabytes=100)


def stored_requests(directory: Path) -> list[RequestRecord]:
    """Every request of every pair, oldest first."""
    with opened(directory) as store:
        ids = sorted(one.id for pair in store.requests.pairs() for one in store.requests.list(pair))
        return store.requests.load(ids)


def add_adapter(
    directory: Path, folders: tuple[Path, Path], *, promote: bool, strength: float = 0.5, draft: str = ""
) -> str:
    """Put an adapter into the store that changes what the draft says; returns its name.

    Args:
        directory: of the store.
        folders: of the target and the draft.
        promote: make it the active one.
        strength: standard deviation of B.
        draft: another draft's name, where it shall not fit.
    """
    pair = PairKey(str(folders[0]), draft or str(folders[1]))
    spec, random = LoraSpec(rank=4, alpha=8, target_modules=("q_proj",)), np.random.default_rng(0)
    modules = {
        name: LoraModule(
            (random.standard_normal((4, columns)) / 8).astype(np.float32),
            (random.standard_normal((rows, 4)) * strength).astype(np.float32),
        )
        for name, (rows, columns) in adapted_modules(read_architecture(folders[1]), spec.target_modules)
    }
    with opened(directory) as store:
        name = store.adapters.next_name()
        folder = adapter_folder(directory, name)
        folder.parent.mkdir(exist_ok=True)
        write_adapter(folder, Lora(spec, modules), base_model=pair.draft, facts={})
        store.adapters.add(
            AdapterRecord(
                name=name,
                pair=pair,
                parent=None,
                created_s=time.time(),
                status=AdapterStatus.REJECTED,
                form="unfused",
                run=None,
                reason="made by a test",
                metrics={},
            )
        )
        if promote:
            store.adapters.promote(name, reason="a test wants it")
    return name
