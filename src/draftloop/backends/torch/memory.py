"""PyTorch's out-of-memory errors told as ours. Must not know what was being done or what would help."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from draftloop.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn an allocation that fails inside, on a GPU or on a CPU, into ours.

    Args:
        what: what was being done ("drafting").
        remedy: as for every error.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU it is a RuntimeError like any other but for its words.
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(f"memory ran out while {what}", remedy=remedy) from error
