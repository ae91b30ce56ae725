"""What the page may change: the active adapter.

Contract: the checks are those of `draftloop adapters promote|revert`; the draft wears the result from the
next request on. Must not know HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.backends.architecture import read_architecture
from draftloop.errors import InputError
from draftloop.learning.by_hand import promote_by_hand
from draftloop.loading import open_storage, pair_of
from draftloop.models.resolve import resolve

if TYPE_CHECKING:
    from draftloop.server.service import Service
    from draftloop.storage.store import Store

REVERT_REASON = "Reverted by hand."


def promote(service: Service, name: str) -> str:
    """Make an adapter the active one, also one that the gate has rejected; what to say of it.

    Raises:
        InputError: there is none of that name, it is another pair's, or it is active already.
        ModelUnreadable: its files are damaged, or another model's.
        StorageError: the store cannot be written.
    """
    config = service.config
    architecture = read_architecture(resolve(config.models.draft.name))
    with _open(service) as store:
        before = promote_by_hand(store, Path(config.storage.directory), pair_of(config), architecture, name)
    return f"{name} is active from the next request on. It was {before.status.value} before: {before.reason}"


def revert(service: Service) -> str:
    """Take the active adapter back; what to say of it.

    Raises:
        InputError: none is active.
        StorageError: the store cannot be written.
    """
    pair = pair_of(service.config)
    with _open(service) as store:
        before, now = store.adapters.active(pair), store.adapters.revert(pair, REVERT_REASON)
    taken, name = "" if before is None else before.name, "the bare draft" if now is None else now.name
    return f"{taken} is taken back; {name} is active from the next request on."


def _open(service: Service) -> Store:
    """The store, to write: where answers are not stored the service only reads it."""
    if service.store is None:
        raise InputError("nothing was ever stored, and so there is no adapter", remedy="Train one first.")
    return open_storage(service.config)
