"""Which adapter the draft shall wear: the one that the store calls active.

Contract: looks at the store cheaply and reads files only when the answer has changed, so that another
process may promote or revert while this one answers. Must not know how a backend deploys it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.backends.lora import AdapterForm
from draftloop.errors import InputError
from draftloop.models.adapter_files import read_adapter
from draftloop.models.cache import exclusive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from draftloop.backends.lora import Lora
    from draftloop.storage.records import AdapterRecord, PairKey
    from draftloop.storage.store import Store

ADAPTERS_FOLDER = "adapters"


@dataclass(frozen=True, slots=True)
class Deployed:
    """An adapter as it is worn."""

    name: str
    lora: Lora
    form: AdapterForm


@dataclass(frozen=True, slots=True)
class Change:
    """The active adapter is another one than before; None is the bare draft."""

    deployed: Deployed | None


def adapter_folder(directory: Path, name: str) -> Path:
    """Where an adapter's files lie below `storage.directory`."""
    return directory / ADAPTERS_FOLDER / name


def load_deployed(store: Store, directory: Path, name: str) -> Deployed:
    """An adapter by its name, in the form it was measured in.

    Raises:
        InputError: there is none of that name.
        ModelUnreadable: its files are damaged.
    """
    return _deployed(directory, known_adapter(store, name))


def known_adapter(store: Store, name: str) -> AdapterRecord:
    """The adapter of that name.

    Raises:
        InputError: there is none.
    """
    record = store.adapters.get(name)
    if record is None:
        raise InputError(f"there is no adapter {name!r}", remedy="draftloop adapters list names them.")
    return record


@contextmanager
def new_adapter_name(store: Store, directory: Path) -> Iterator[str]:
    """The next adapter's name. Nobody else is given it before the block, which stores the adapter, ends."""
    with exclusive(directory / ADAPTERS_FOLDER / "name"):
        yield store.adapters.next_name()


def _deployed(directory: Path, record: AdapterRecord) -> Deployed:
    return Deployed(
        record.name, read_adapter(adapter_folder(directory, record.name)), AdapterForm(record.form)
    )


class ActiveAdapter:
    """Follows the active adapter of one pair.

    Args:
        store: tells which one is active.
        directory: `storage.directory`.
        pair: whose adapter.
    """

    def __init__(self, store: Store, directory: Path, pair: PairKey) -> None:
        self._store = store
        self._directory = directory
        self._pair = pair
        self._generation: int | None = None
        self._name: str | None = None

    def changed(self) -> Change | None:
        """What to wear from now on, where that is something else than at the last call; else None.

        Raises:
            ModelUnreadable: the active adapter's files are damaged. That is told once; the next call says
                None, so that whoever answers can go on with what is worn.
        """
        generation = self._store.adapters.generation(self._pair)
        if generation == self._generation:
            return None
        active = self._store.adapters.active(self._pair)
        before, self._name = self._name, None if active is None else active.name
        self._generation = generation
        if self._name == before:
            return None
        return Change(None if active is None else _deployed(self._directory, active))
