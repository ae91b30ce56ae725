"""Ctrl-C as a wish that is heeded between two pieces of work, not in the middle of one.

Contract: inside the block the first Ctrl-C sets a flag; the second one interrupts at once. Must not know the
work.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def interrupt_as_flag(first: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """Give the flag that Ctrl-C sets.

    Args:
        first: is called at the first Ctrl-C, to say that it was heard.

    Raises:
        KeyboardInterrupt: at the second one, for those who will not wait.
    """
    flag = threading.Event()

    def stop(*_: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        first()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
