"""The programs that ours is measured against: their modes, what they need, and how each is opened.

Contract: looks, but loads nothing before a contender is opened. Must not know how figures are shown.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftloop.backends.registry import is_apple_silicon
from draftloop.benchmarking.child import ChildContender
from draftloop.benchmarking.frameworks import open_mlx_lm, open_transformers
from draftloop.benchmarking.llama_cpp import gguf_file, open_llama_cpp
from draftloop.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from draftloop.benchmarking.child import PeerSetup, Program
    from draftloop.config import Config
    from draftloop.models.progress import Progress


@dataclass(frozen=True, slots=True)
class Peer:
    """One program.

    Attributes:
        name: as in `--against`.
        modules: that must be importable.
        install: the command that installs them.
        modes: name of each mode, and whether it drafts.
        open_program: at the top of its module.
        reads_gguf: needs GGUF files instead of folders of safetensors.
        apple_only: elsewhere it is too slow for real models, so that it must be named to take part.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    modes: Mapping[str, bool]
    open_program: Callable[[PeerSetup], Program]
    reads_gguf: bool = False
    apple_only: bool = False

    @property
    def installed(self) -> bool:
        """Whether its modules can be imported."""
        return all(importlib.util.find_spec(module) is not None for module in self.modules)


PEERS = (
    Peer(
        name="llama.cpp",
        modules=("xllamacpp",),
        install="pip install 'draftloop[bench]'",
        modes={"llama.cpp": False, "llama.cpp+draft": True},
        open_program=open_llama_cpp,
        reads_gguf=True,
    ),
    Peer(
        name="mlx-lm",
        modules=("mlx", "mlx_lm"),
        install="pip install 'draftloop[mlx]'",
        modes={"mlx-lm": True},
        open_program=open_mlx_lm,
        apple_only=True,
    ),
    Peer(
        name="transformers",
        modules=("torch", "transformers"),
        install="pip install 'draftloop[torch]'",
        modes={"transformers": True},
        open_program=open_transformers,
    ),
)


def peer_named(name: str) -> Peer:
    """A peer by its name.

    Raises:
        InputError: there is none, or it is not installed.
    """
    for peer in PEERS:
        if peer.name == name:
            return _checked(peer)
    names = ", ".join(peer.name for peer in PEERS)
    raise InputError(f"--against {name}: there is no such peer", remedy=f"Choose from {names}, or installed.")


def peer_of_mode(mode: str) -> Peer | None:
    """The peer that has this mode; None where none has.

    Raises:
        InputError: it is not installed.
    """
    peer = next((peer for peer in PEERS if mode in peer.modes), None)
    return None if peer is None else _checked(peer)


def installed_peers() -> list[Peer]:
    """The peers that are here and make sense on this machine."""
    return [peer for peer in PEERS if peer.installed and (not peer.apple_only or is_apple_silicon())]


def peer_modes() -> list[str]:
    """The modes of all peers."""
    return [mode for peer in PEERS for mode in peer.modes]


def peer_setup(peer: Peer, mode: str, setup: PeerSetup, config: Config, progress: Progress) -> PeerSetup:
    """The setup of one mode: in the files that the peer reads, and without a draft where it does not draft.

    Raises:
        InputError: the pair is not to be had in those files.
    """
    drafts = peer.modes[mode]
    if peer.reads_gguf:
        models = config.models
        return replace(
            setup,
            target=gguf_file(models.target.name, progress),
            draft=gguf_file(models.draft.name, progress) if drafts else None,
        )
    return setup if drafts else replace(setup, draft=None)


def open_peer(peer: Peer, mode: str, setup: PeerSetup) -> ChildContender:
    """Load one mode in a child.

    Raises:
        DraftloopError: it could not be loaded.
    """
    return ChildContender(mode, peer.open_program, setup)


def _checked(peer: Peer) -> Peer:
    if not peer.installed:
        raise InputError(f"{peer.name} is not installed", remedy=f"Install it: {peer.install}.")
    return peer
