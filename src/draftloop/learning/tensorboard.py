"""Training curves for TensorBoard (`logging.tensorboard`), beside another watcher.

Contract: writes event files below the run's folder with tensorboardX, which needs no framework. Must not
know what the figures mean.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from draftloop.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from tensorboardX import SummaryWriter

    from draftloop.learning.circle import Watcher
    from draftloop.storage.records import RunPoint

_SCALARS = ("loss", "learning_rate", "gradient_norm", "validation_alpha")


def require_tensorboard() -> None:
    """Check that the event files can be written, before a run begins.

    Raises:
        InputError: tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError(
            "logging.tensorboard = true needs the package tensorboardX, which is not installed",
            remedy="Install it: pip install 'draftloop[tensorboard]', or set logging.tensorboard=false.",
        )


class TensorBoardWatcher:
    """Passes everything on, and writes each point's figures.

    Args:
        watcher: is told everything.
        folder: where the event files go.
    """

    def __init__(self, watcher: Watcher, folder: Path) -> None:
        self._watcher = watcher
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._writer is not None:
            self._writer.close()

    def note(self, text: str) -> None:
        """See `Watcher`."""
        self._watcher.note(text)

    def planned(self, total_steps: int, steps_done: int) -> None:
        """See `Watcher`. A resumed run's later points come again: the old ones are taken away."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=steps_done + 1 if steps_done else None)
        self._watcher.planned(total_steps, steps_done)

    def point(self, point: RunPoint) -> None:
        """See `Watcher`."""
        if self._writer is not None:
            for name in _SCALARS:
                value = getattr(point, name)
                if value is not None:
                    self._writer.add_scalar(f"training/{name}", value, point.step)
            self._writer.flush()
        self._watcher.point(point)

    def judging(self, held_out: int, compared: int) -> None:
        """See `Watcher`."""
        self._watcher.judging(held_out, compared)

    def judged(self, share: float) -> None:
        """See `Watcher`."""
        self._watcher.judged(share)
