"""CUDA C compiled while the program runs, and launched on PyTorch's stream.

Contract: `Kernel.launch` queues one launch; a CUDA graph can record it. NVRTC, the compiler, comes with
PyTorch's CUDA builds, so no toolkit is needed. Must not know what a kernel computes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, Structure, Union, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PROGRAMMATIC_SERIALIZATION = 6
"""CUlaunchAttributeID: a kernel may start while the one before it ends, and waits for it by itself."""
_HOPPER = (9, 0)


class CudaError(RuntimeError):
    """A call of the driver or of NVRTC failed. No error of the program's: who catches it has another way."""


class _AttributeValue(Union):
    _fields_ = (("allowed", c_int), ("padding", ctypes.c_char * 64))


class _Attribute(Structure):
    _fields_ = (("id", c_int), ("padding", c_int), ("value", _AttributeValue))


class _Launch(Structure):
    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("num_attributes", c_uint),
    )


class Kernel:
    """One function of a compiled source, on the current device.

    Args:
        module: keeps the code loaded.
        name: of an `extern "C"` function.
    """

    def __init__(self, module: c_void_p, name: str) -> None:
        self._function = c_void_p()
        _check(_driver().cuModuleGetFunction(byref(self._function), module, name.encode()), name)
        self._attribute = _Attribute(id=_PROGRAMMATIC_SERIALIZATION)
        self._attribute.value.allowed = 1
        self._num_attributes = int(torch.cuda.get_device_capability() >= _HOPPER)

    def launch(self, blocks: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        """Queue it: tensors go as their addresses, None as no address, numbers as ctypes'.

        Raises:
            CudaError: the driver refuses.
        """
        values = [_value(argument) for argument in arguments]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        launch = _Launch(
            (*blocks, 1),
            (threads, 1, 1),
            0,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(self._attribute),
            self._num_attributes,
        )
        _check(_driver().cuLaunchKernelEx(byref(launch), self._function, pointers, None), "launch")


def compiled(path: Path, macros: Mapping[str, int]) -> c_void_p:
    """The module that `path` becomes with `macros`, loaded on the current device.

    Raises:
        CudaError: there is no compiler, or it found an error.
    """
    code = translated(path, macros, torch.cuda.get_device_capability())
    module = c_void_p()
    _check(_driver().cuModuleLoadData(byref(module), code), path.name)
    return module


def translated(path: Path, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The machine code of `path`; needs no GPU. See `compiled`."""
    nvrtc, program = _nvrtc(), c_void_p()
    source = path.read_bytes()
    _check(nvrtc.nvrtcCreateProgram(byref(program), source, path.name.encode(), 0, None, None), path.name)
    try:
        major, minor = capability
        options = [f"-arch=sm_{major}{minor}", *(f"-D{name}={value}" for name, value in macros.items())]
        encoded = (c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            raise CudaError(_text(program, "ProgramLog").decode(errors="replace")[:2000])
        return _text(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _text(program: c_void_p, name: str) -> bytes:
    """What NVRTC holds of a program under this name."""
    nvrtc, size = _nvrtc(), c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{name}Size")(program, byref(size)), name)
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{name}")(program, text), name)
    return text.raw


def _value(argument: Any) -> Any:
    if argument is None or isinstance(argument, torch.Tensor):
        return c_void_p(None if argument is None else argument.data_ptr())
    return argument


def _check(status: int, what: str) -> None:
    if status:
        raise CudaError(f"{what}: status {status}")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(str(error)) from error


@cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC of PyTorch's own CUDA version: beside the system's libraries, or in NVIDIA's packages."""
    major = (torch.version.cuda or "13").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages else None
    found = [path for folder in folders or () for path in Path(folder).glob(f"*/lib/{name}")]
    for candidate in (*map(str, found), name):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CudaError(f"{name} cannot be loaded")
