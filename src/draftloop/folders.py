"""Where Draftloop keeps what can be made again: models, compiled kernels.

Contract: names a folder, creates nothing. Must not know what is kept there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from draftloop.errors import InputError


def cache_root() -> Path:
    """`$DRAFTLOOP_CACHE`, else the place this system keeps caches in.

    Raises:
        InputError: it stands below a home folder that does not exist.
    """
    own, xdg = os.environ.get("DRAFTLOOP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        if xdg:
            return Path(xdg).expanduser() / "draftloop"
        home = Path.home()
    except RuntimeError as error:
        raise InputError(
            f"There is no home folder for the cache {own or xdg or '~'}",
            remedy="Set DRAFTLOOP_CACHE to a folder.",
        ) from error
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "draftloop"
    return home / ".cache" / "draftloop"
