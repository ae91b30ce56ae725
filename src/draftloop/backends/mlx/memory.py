"""When memory runs out under MLX: its words for it, and ours.

Contract: MLX tells by a plain RuntimeError; only its words set it apart. Two cases never come this far: a
Metal command buffer that is refused for lack of memory may end the process (ml-explore/mlx#479), and the
build for a Linux CPU does not check what the allocator gives. The memory plan must prevent those. Must not
know models.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from draftloop.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORDS = (
    "malloc]",  # "[metal::malloc] Attempting to allocate …"
    "unable to allocate",
    "insufficient memory",  # Metal, of a command buffer, where the error does arrive
    "out of memory",  # CUDA
)


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn MLX's out-of-memory errors into ours.

    Raises:
        OutOfMemory: memory ran out while `what`; any other error passes as it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if not isinstance(error, MemoryError) and not any(words in told for words in _WORDS):
            raise
        raise OutOfMemory(f"memory ran out while {what}", remedy=remedy) from error
