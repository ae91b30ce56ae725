"""What a user does to adapters by hand: bring one in, promote one.

Contract: nothing becomes active whose files are not whole or not this draft's. Must not know the command
line.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from draftloop.backends.lora import AdapterForm, adapted_modules
from draftloop.errors import InputError, ModelUnreadable
from draftloop.learning.deployment import adapter_folder, known_adapter, new_adapter_name
from draftloop.learning.recipe import Recipe
from draftloop.models.adapter_files import read_adapter, write_adapter
from draftloop.storage.records import AdapterRecord, AdapterStatus

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import Lora
    from draftloop.storage.records import PairKey
    from draftloop.storage.store import Store


def import_adapter(
    store: Store, directory: Path, pair: PairKey, architecture: Architecture, folder: Path
) -> AdapterRecord:
    """Copy an adapter in PEFT's layout into the store's folder. It is not active by that.

    Args:
        store: is told of it.
        directory: `storage.directory`.
        pair: whose draft it is for.
        architecture: the draft's.
        folder: what PEFT's `save_pretrained` wrote.

    Raises:
        ModelUnreadable: it is damaged, of a kind that cannot be run, or another model's.
        StorageError: it cannot be written.
    """
    lora = read_adapter(folder)
    check_fits(architecture, lora)
    reason = f"brought in from {folder.absolute()}; the gate has not judged it"
    with new_adapter_name(store, directory) as name:
        facts = {"name": name, "form": AdapterForm.UNFUSED.value, "imported_from": str(folder.absolute())}
        write_adapter(adapter_folder(directory, name), lora, base_model=pair.draft, facts=facts)
        record = AdapterRecord(
            name=name,
            pair=pair,
            parent=None,
            created_s=time.time(),
            status=AdapterStatus.IMPORTED,
            form=AdapterForm.UNFUSED.value,
            run=None,
            reason=reason,
            metrics={},
        )
        store.adapters.add(record)
    return record


def promote_by_hand(
    store: Store, directory: Path, pair: PairKey, architecture: Architecture, name: str
) -> AdapterRecord:
    """Make an adapter the active one, whatever the gate said of it.

    Returns:
        The adapter as it was before, so that its status and reason can be told.

    Raises:
        InputError: there is none of that name, it is another pair's, or it is active already.
        ModelUnreadable: its files are damaged, or another model's.
    """
    record = known_adapter(store, name)
    if record.pair != pair:
        raise InputError(
            f"adapter {name} is for the draft {record.pair.draft} under {record.pair.target}, "
            f"not for {pair.draft} under {pair.target}",
            remedy="draftloop adapters list names those of this pair.",
        )
    active = store.adapters.active(pair)
    if active is not None and active.name == name:
        raise InputError(f"adapter {name} is active already", remedy="There is nothing to do.")
    check_fits(architecture, read_adapter(adapter_folder(directory, name)))
    run = None if record.run is None else store.runs.get(record.run)
    learnt = () if run is None else Recipe.from_json(run.recipe).learnt
    store.adapters.promote(name, trained_request_ids=learnt, reason=_promoted(record))
    return record


def check_fits(architecture: Architecture, lora: Lora) -> None:
    """Check that every module of `lora` is the draft's and has its shape.

    Raises:
        ModelUnreadable: names the first one that does not.
    """
    shapes = dict(adapted_modules(architecture, tuple(architecture.linear_shapes)))
    for name, module in lora.modules.items():
        found = [len(module.b), module.a.shape[1]]
        if shapes.get(name) != tuple(found):
            needed = f"{list(shapes[name])} in this draft" if name in shapes else "not in this draft"
            raise ModelUnreadable(
                f"the adapter changes {name} of shape {found}, which is {needed}",
                remedy="Choose an adapter that was trained on this very draft.",
            )


def _promoted(record: AdapterRecord) -> str:
    """Why it is active now, with what was said of it before."""
    return f"Promoted by hand; before, it was {record.status.value}: {record.reason}"
