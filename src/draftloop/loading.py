"""Settings -> a checked plan -> an engine. The only place where configuration meets models and backends.

Contract: `prepare` does all that is cheap (names resolve, tokenizers agree, the memory plan fits) and
loads no weights; `load_engine` loads them. Must not know the command line.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.backends.architecture import Architecture, read_architecture
from draftloop.backends.registry import open_backend
from draftloop.engine import Engine
from draftloop.errors import ConfigError, ModelUnreadable
from draftloop.models.memory import MemoryPlan, plan_memory
from draftloop.models.resolve import resolve
from draftloop.models.tokenizer import Tokenizer, check_tokenizers_agree
from draftloop.speculation.stream import Pair

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.backends.base import Backend
    from draftloop.config import Config
    from draftloop.models.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Models that are known to fit together and into this machine. Without a draft: the target alone."""

    target_folder: Path
    target: Architecture
    draft_folder: Path | None
    draft: Architecture | None
    tokenizer: Tokenizer
    backend: Backend
    plan: MemoryPlan


def prepare(config: Config, progress: Progress | None = None, *, with_draft: bool = True) -> Prepared:
    """Resolve the names (downloading where needed) and check everything that needs no weights.

    Args:
        config: the effective settings.
        progress: shows downloads and conversions.
        with_draft: False leaves the draft alone (`--no-speculation`): it need not even exist.

    Raises:
        ModelNotFound, ModelUnreadable, TokenizerMismatch, BackendUnavailable, MemoryPlanError,
        ConfigError: what is wrong, and what would be right.
    """
    backend = open_backend(config.backend, config.device)
    target_folder = resolve(config.models.target.name, progress=progress)
    target, tokenizer = _checked("target", target_folder, config.models.target.max_kv_cache_tokens)
    draft_folder, draft = None, None
    if with_draft:
        draft_folder = resolve(config.models.draft.name, progress=progress)
        draft, other = _checked("draft", draft_folder, config.models.draft.max_kv_cache_tokens)
        check_tokenizers_agree(tokenizer, other)
    plan = plan_memory(target, draft, config, backend.capabilities().device_memory_bytes)
    return Prepared(target_folder, target, draft_folder, draft, tokenizer, backend, plan)


def load_engine(config: Config, progress: Progress | None = None, *, with_draft: bool = True) -> Engine:
    """Prepare, and load the models."""
    return load_prepared(config, prepare(config, progress, with_draft=with_draft))


def load_prepared(config: Config, prepared: Prepared) -> Engine:
    """Load prepared models, for those who look at them first (`generate` checks its prompts).

    Raises:
        MemoryPlanError: they do not fit into this machine.
    """
    prepared.plan.check_generation()
    backend, started_s = prepared.backend, time.perf_counter()
    target = backend.load(
        prepared.target_folder, max_kv_cache_tokens=config.models.target.max_kv_cache_tokens
    )
    draft = None
    if prepared.draft_folder is not None:
        draft = backend.load(
            prepared.draft_folder, max_kv_cache_tokens=config.models.draft.max_kv_cache_tokens
        )
    logger.debug("models loaded in %.1f s", time.perf_counter() - started_s)
    return Engine(
        backend,
        Pair(target, draft),
        prepared.tokenizer,
        cache_clear_frequency=config.memory.cache_clear_frequency,
    )


def _checked(role: str, folder: Path, max_kv_cache_tokens: int) -> tuple[Architecture, Tokenizer]:
    architecture, tokenizer = read_architecture(folder), Tokenizer.load(folder)
    if max_kv_cache_tokens > architecture.max_position_tokens:
        raise ConfigError(
            f"models.{role}.max_kv_cache_tokens = {max_kv_cache_tokens} exceeds the {role}'s context of "
            f"{architecture.max_position_tokens} tokens",
            remedy=f"Set it to {architecture.max_position_tokens} or less.",
        )
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ModelUnreadable(
            f"the {role}'s tokenizer has {tokenizer.vocab_size} tokens and its embedding "
            f"{architecture.vocab_size} rows",
            remedy="Tokens were added without training them in; choose the model's own tokenizer files.",
        )
    return architecture, tokenizer
