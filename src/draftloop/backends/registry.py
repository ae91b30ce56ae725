"""Which backend runs here. The only place that picks one; it imports a framework only when chosen."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import TYPE_CHECKING

from draftloop.errors import BackendUnavailable

if TYPE_CHECKING:
    from draftloop.backends.base import Backend

BACKENDS = ("numpy", "torch", "mlx")
DEVICES = ("auto", "cpu", "gpu")


def is_apple_silicon() -> bool:
    """Whether this machine is a Mac with an Apple chip."""
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def is_installed(name: str) -> bool:
    """Whether a backend's framework can be imported."""
    needed = {"numpy": ("numpy",), "torch": ("torch",), "mlx": ("mlx", "mlx_lm")}[name]
    return all(importlib.util.find_spec(module) is not None for module in needed)


def choose_backend() -> str:
    """What `backend: auto` means here: MLX on Apple silicon, else PyTorch."""
    return "mlx" if is_apple_silicon() else "torch"


def let_waiting_threads_sleep() -> None:
    """Call it before PyTorch is imported: OpenMP reads this when PyTorch loads it.

    Threads that wait by spinning use up their time slices and are then put aside for milliseconds, hundreds
    of times a token: with one busy process beside them a token took ten times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def open_backend(name: str = "auto", device: str = "auto") -> Backend:
    """Open a backend.

    Args:
        name: `auto`, `numpy`, `torch` or `mlx`.
        device: `auto` (a GPU where there is one), `cpu` or `gpu`.

    Raises:
        BackendUnavailable: the framework is not installed, or the device is not there.
    """
    chosen = choose_backend() if name == "auto" else name
    if chosen not in BACKENDS:
        raise BackendUnavailable(
            f"backend {chosen!r} is unknown", remedy=f"Choose auto, {', '.join(BACKENDS)}."
        )
    if not is_installed(chosen):
        raise BackendUnavailable(
            f"backend {chosen!r} is not installed",
            remedy=_how_to_install(chosen),
        )
    if chosen == "torch":
        let_waiting_threads_sleep()
        from draftloop.backends.torch.backend import TorchBackend

        return TorchBackend(device)
    if chosen == "mlx":
        from draftloop.backends.mlx.backend import MlxBackend

        return MlxBackend(device)
    from draftloop.backends.numpy.backend import NumpyBackend

    return NumpyBackend(device)


def _how_to_install(name: str) -> str:
    """`make setup` installs the one that `auto` chooses on this machine, and no other."""
    by_pip = f"`pip install 'draftloop[{name}]'`"
    usual = choose_backend()
    if name == usual:
        return f"Run `make setup`, or {by_pip}."
    return f"{by_pip} installs it; here backend: auto chooses {usual}."
