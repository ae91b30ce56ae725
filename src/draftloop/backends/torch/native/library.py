"""Compiles the C files beside it for this processor, once, and loads it.

Contract: `load_library` gives the functions, or None where this machine cannot have them: another processor,
no C compiler, no place to write. Nothing fails for want of it. Must not know tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

from draftloop.errors import InputError
from draftloop.folders import cache_root

logger = logging.getLogger(__name__)

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
HEADER = Path(__file__).with_name("kernels.h")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})
"""As /proc/cpuinfo calls them."""
SWITCH = "DRAFTLOOP_NATIVE"
"""Environment: 0 leaves the kernels out, to compare with PyTorch's own."""
COMPILE_TIMEOUT_S = 120


@cache
def load_library(threads: int) -> ctypes.CDLL | None:
    """The compiled kernels with `threads` threads in all, or None with the reason in the debug log."""
    reason = why_not()
    if reason is None:
        try:
            return _library(threads)
        except (OSError, AttributeError, InputError, subprocess.SubprocessError) as error:
            logger.warning("our own kernels cannot be used, PyTorch's slower ones do the work: %s", error)
            return None
    logger.debug("no kernels of our own: %s", reason)
    return None


def _library(threads: int) -> ctypes.CDLL:
    path = _compiled()
    try:
        return _loaded(path, threads)
    except (OSError, AttributeError):
        # A loss of power may leave a file without its content.
        path.unlink(missing_ok=True)
        return _loaded(_compiled(), threads)


def why_not() -> str | None:
    """What this machine lacks for the kernels, in words; None where it lacks nothing."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    missing = sorted(NEEDED - _processor_flags())
    if platform.system() != "Linux" or missing:
        return f"the processor has no {', '.join(missing) or 'Linux'}"
    if _compiler() is None:
        return "there is no C compiler (cc, gcc or clang)"
    return None


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _compiled() -> Path:
    """The shared object for this source and processor, compiled if it is not there yet.

    Raises:
        OSError, InputError: there is no place for it.
        subprocess.SubprocessError: the compiler failed.
    """
    sources = b"".join(path.read_bytes() for path in (HEADER, *SOURCES))
    parts = (sources, " ".join(FLAGS).encode(), " ".join(sorted(_processor_flags())).encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = cache_root() / "native" / f"kernels-{digest}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [str(_compiler()), *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(target)
    return target


def _loaded(path: Path, threads: int) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.dl_multiply.argtypes, library.dl_multiply.restype = [c_void_p, c_void_p, c_void_p, c_long], c_int
    library.dl_unpack.argtypes = [c_void_p] * 4 + [c_long] * 3
    library.dl_norm.argtypes = [c_void_p] * 4 + [c_long] * 2 + [c_float]
    library.dl_gate.argtypes = [c_void_p] * 2 + [c_long] * 2
    library.dl_attend.argtypes = [c_void_p] * 9 + [c_long] * 6 + [c_float]
    for name in ("unpack", "norm", "gate", "attend"):
        getattr(library, f"dl_{name}").restype = None
    library.dl_start.argtypes, library.dl_start.restype = [c_int], c_int
    library.dl_start(threads)
    return library
