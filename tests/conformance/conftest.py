"""Every test of this folder runs on every backend that is installed, on `--device` (the processor)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from draftloop.backends.registry import BACKENDS, is_installed, open_backend
from draftloop.speculation.stream import Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from draftloop.backends.base import Backend, Model
    from draftloop.backends.vocabulary import CutVocabulary

CACHE_TOKENS = 128


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn; skipped only where its framework is not installed."""
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with _one_thread(request.param):
        device = "cpu" if request.param == "numpy" else request.config.getoption("--device")
        yield open_backend(request.param, device=device)


@pytest.fixture(scope="session")
def rounding(pytestconfig: pytest.Config) -> Callable[..., float]:
    """`rounding(exact, coarse, **options)`: a bound for a toy; a GPU computes 4-bit layers in bfloat16."""

    def choose(exact: float, coarse: float, **options: Any) -> float:
        on_gpu = pytestconfig.getoption("--device") == "gpu"
        return coarse if on_gpu and options.get("quantized") else exact

    return choose


@contextmanager
def _one_thread(name: str) -> Iterator[None]:
    """A toy's matrices are so small that PyTorch's threads cost more than they bring."""
    if name != "torch":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference() -> Backend:
    """The NumPy backend, which the others are held to."""
    return open_backend("numpy", device="cpu")


@pytest.fixture(scope="session")
def load_toy(toy_folder: Callable[..., Path]) -> Callable[..., Model]:
    """`load_toy(backend, **options)`: one toy with a cache of 128 tokens."""

    def load(backend: Backend, **options: Any) -> Model:
        return backend.load(toy_folder(**options), max_kv_cache_tokens=CACHE_TOKENS)

    return load


@pytest.fixture(scope="session")
def load_pair(toy_pair: Callable[..., tuple[Path, Path]]) -> Callable[..., Pair]:
    """`load_pair(backend, **options)`: a toy target and its draft, whose head may be cut to `vocabulary`."""

    def load(backend: Backend, vocabulary: CutVocabulary | None = None, **options: Any) -> Pair:
        target, draft = toy_pair(**options)
        return Pair(
            target=backend.load(target, max_kv_cache_tokens=CACHE_TOKENS),
            draft=backend.load(draft, max_kv_cache_tokens=CACHE_TOKENS, vocabulary=vocabulary),
        )

    return load
