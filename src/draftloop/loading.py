"""Settings -> a checked plan -> an engine. The only place where configuration meets models and backends.

Contract: `prepare` does all that is cheap (names resolve, tokenizers agree, the memory plan fits) and
loads no weights; `load_engine` loads them; `open_school` is where the draft learns. Must not know the command
line.
"""

from __future__ import annotations

import logging
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.backends.architecture import Architecture, read_architecture
from draftloop.backends.registry import open_backend
from draftloop.engine import Engine
from draftloop.errors import ConfigError, DraftloopError, ModelUnreadable, StorageError
from draftloop.learning.circle import School
from draftloop.learning.deployment import ActiveAdapter, load_deployed
from draftloop.learning.recent import recent_rounds
from draftloop.learning.recorder import Recorder
from draftloop.learning.vocabulary import Wanted, choose_vocabulary
from draftloop.learning.yielding import UNHURRIED, Answering
from draftloop.models.folder import heads_digest
from draftloop.models.memory import MEGABYTE, MemoryPlan, plan_memory
from draftloop.models.resolve import locate, resolve
from draftloop.models.tokenizer import Tokenizer, check_tokenizers_agree
from draftloop.speculation.calibration import ServedRounds
from draftloop.speculation.prefixes import PrefixCache
from draftloop.speculation.rehearsal import rehearse
from draftloop.speculation.remembered import calibrated_costs, calibration_facts, nearest_costs
from draftloop.speculation.schedule import Schedule
from draftloop.speculation.stream import Pair
from draftloop.speculation.suffix import BYTES_PER_TOKEN, SuffixIndex
from draftloop.storage.records import PairKey
from draftloop.storage.store import open_store
from draftloop.types import Sampling

if TYPE_CHECKING:
    from draftloop.backends.base import Backend
    from draftloop.backends.vocabulary import CutVocabulary
    from draftloop.config import Config
    from draftloop.learning.yielding import Courtesy
    from draftloop.models.progress import Progress
    from draftloop.speculation.costs import RoundCosts
    from draftloop.storage.store import Store

logger = logging.getLogger(__name__)


ACTIVE, NONE = "active", "none"
"""Words for an adapter that are no adapter's name."""

AUTO_EVICTION_THRESHOLD = 0.5
"""What counts as a failure for the store's size bound where `acceptance_threshold` is `auto`."""


@dataclass(frozen=True, slots=True)
class PreparedDraft:
    """A draft that is known to fit into this machine while it trains."""

    folder: Path
    architecture: Architecture
    tokenizer: Tokenizer
    backend: Backend


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
    device_bytes = backend.capabilities().device_memory_bytes
    plan = plan_memory(target, draft, config, device_bytes, num_suffix_tokens=suffix_tokens(config))
    return Prepared(target_folder, target, draft_folder, draft, tokenizer, backend, plan)


def sampling_of(config: Config) -> Sampling:
    """How logits become a distribution, from the settings."""
    speculative = config.speculative
    return Sampling(
        temperature=speculative.temperature,
        top_p=speculative.top_p,
        top_k=speculative.top_k,
        min_p=speculative.min_p,
    )


def pair_of(config: Config) -> PairKey:
    """The pair's key in the store."""
    return PairKey(config.models.target.name, config.models.draft.name)


def open_storage(config: Config, *, read_only: bool = False) -> Store:
    """The store in `storage.directory`.

    Raises:
        StorageError: it is damaged, cannot be written (or, read-only, is absent), or was made by a newer
            version.
    """
    threshold = config.speculative.acceptance_threshold
    return open_store(
        Path(config.storage.directory),
        max_megabytes=config.storage.max_megabytes,
        failure_threshold=threshold if threshold != "auto" else AUTO_EVICTION_THRESHOLD,
        read_only=read_only,
    )


def load_engine(config: Config, progress: Progress | None = None, *, with_draft: bool = True) -> Engine:
    """Prepare, and load the models: the bare draft, nothing stored."""
    return load_prepared(config, prepare(config, progress, with_draft=with_draft))


def load_prepared(
    config: Config, prepared: Prepared, store: Store | None = None, *, adapter: str = ACTIVE
) -> Engine:
    """Load prepared models, for those who look at them first (`generate` checks its prompts).

    Args:
        config: the effective settings.
        prepared: what `prepare` found.
        store: tells the adapters; keeps the requests that say where they come from where `storage.collect`
            is true. Without one nothing is stored and the draft is bare.
        adapter: `active` follows the store, `none` is the bare draft, else the name of an adapter.

    Raises:
        MemoryPlanError: they do not fit into this machine.
        InputError: there is no adapter of that name.
        ModelUnreadable: its files are damaged, or made for another draft.
    """
    prepared.plan.check_generation()
    backend, pair, directory = prepared.backend, pair_of(config), Path(config.storage.directory)
    models = _load_pair(config, prepared, store)
    vocabulary = None if models.draft is None else models.draft.vocabulary
    recorder = None
    if store is not None and config.storage.collect:
        name = None if vocabulary is None else vocabulary.name
        recorder = Recorder(store, pair, config.adaptation.revert_after_requests, name)
    answering = Answering(directory) if store is not None else nullcontext
    most_together = prepared.plan.answers_at_once(config.memory.answers_at_once)
    _rehearse(config, backend, models, most_together)
    with answering():
        # A training in the background would be measured with it.
        schedule = _schedule(config, prepared, models, vocabulary)
    engine = Engine(
        backend,
        models,
        prepared.tokenizer,
        cache_clear_frequency=config.memory.cache_clear_frequency,
        recorder=recorder,
        active_adapter=ActiveAdapter(store, directory, pair) if store and adapter == ACTIVE else None,
        prefixes=PrefixCache(MEGABYTE * config.memory.prefix_cache_megabytes),
        schedule=schedule,
        suffixes=_suffixes(config, store if recorder else None),
        most_together=most_together,
        answering=answering,
    )
    if store is not None and adapter not in (ACTIVE, NONE):
        engine.wear(load_deployed(store, directory, adapter))
    engine.follow_adapter()
    if engine.adapter is not None:
        # What was recorded belongs to the bare draft.
        _rehearse(config, backend, models, most_together)
    if store is not None and recorder is not None and schedule is not None:
        schedule.recall(recent_rounds(store, pair, engine.adapter))
    return engine


def _load_pair(config: Config, prepared: Prepared, store: Store | None) -> Pair:
    """Load both models, the draft's head cut as the settings have it."""
    backend, started_s = prepared.backend, time.perf_counter()
    target = backend.load(
        prepared.target_folder, max_kv_cache_tokens=config.models.target.max_kv_cache_tokens
    )
    draft = None
    if prepared.draft_folder is not None and prepared.draft is not None:
        draft = backend.load(
            prepared.draft_folder,
            max_kv_cache_tokens=config.models.draft.max_kv_cache_tokens,
            vocabulary=_vocabulary(config, backend, prepared.tokenizer, prepared.draft, store),
        )
    logger.debug("models loaded in %.1f s", time.perf_counter() - started_s)
    return Pair(target, draft)


def _rehearse(config: Config, backend: Backend, models: Pair, most_together: int) -> None:
    """Let the first rounds, which take long where they are recorded, be over before anybody waits."""
    if backend.capabilities().records_rounds:
        started_s, rounds = time.perf_counter(), served_rounds(config)
        if models.draft is None:
            # Who asks the target alone asks no suffix match either.
            rounds = replace(rounds, num_suffix_tokens=0)
        rehearse(models, rounds, most_together)
        logger.debug("every shape of round run once in %.1f s", time.perf_counter() - started_s)


def prepare_draft(config: Config, progress: Progress | None = None) -> PreparedDraft:
    """Resolve and check the draft alone: training never needs the target's weights.

    The memory plan still counts both, for `doctor`; training is held to the draft's part.

    Raises:
        ModelNotFound, ModelUnreadable, BackendUnavailable, MemoryPlanError: as `prepare`.
    """
    backend = open_backend(config.backend, config.device)
    folder = resolve(config.models.draft.name, progress=progress)
    architecture, tokenizer = _checked("draft", folder, config.models.draft.max_kv_cache_tokens)
    device_bytes = backend.capabilities().device_memory_bytes
    plan = plan_memory(
        architecture, architecture, config, device_bytes, num_suffix_tokens=suffix_tokens(config)
    )
    plan.check_training()
    return PreparedDraft(folder, architecture, tokenizer, backend)


def open_school(
    config: Config, prepared: PreparedDraft, store: Store, courtesy: Courtesy = UNHURRIED
) -> School:
    """Where the draft learns; `courtesy` says when."""
    capabilities = prepared.backend.capabilities()
    vocabulary = _vocabulary(config, prepared.backend, prepared.tokenizer, prepared.architecture, store)
    return School(
        store=store,
        directory=Path(config.storage.directory),
        pair=pair_of(config),
        config=config,
        backend=prepared.backend,
        draft_folder=prepared.folder,
        architecture=prepared.architecture,
        eos_token_ids=sorted(prepared.tokenizer.eos_token_ids),
        facts={
            "draftloop": version("draftloop"),
            "backend": capabilities.backend,
            "backend_version": capabilities.version,
            "device": capabilities.device,
            "python": platform.python_version(),
            "draft_sha256": heads_digest(prepared.folder),
            "draft_vocabulary": "full" if vocabulary is None else vocabulary.name,
        },
        vocabulary=vocabulary,
        by_width=_costs_before(config, prepared.backend, _target_here(config), prepared.folder, vocabulary),
        courtesy=courtesy,
    )


def _vocabulary(
    config: Config, backend: Backend, tokenizer: Tokenizer, draft: Architecture, store: Store | None
) -> CutVocabulary | None:
    """What the draft's head is cut to while it serves; None leaves it whole."""
    wanted = Wanted(
        draft_tokens=draft.vocab_size,
        known_tokens=tokenizer.vocab_size,
        always=tokenizer.special_token_ids,
        from_text=backend.capabilities().drafts_from_text,
    )
    return choose_vocabulary(store, pair_of(config), config.speculative.draft_vocabulary, wanted)


def costs_known(config: Config, prepared: Prepared, store: Store | None) -> RoundCosts | None:
    """What rounds of this pair cost here, as measured before; None where they were not, or need not be."""
    if prepared.draft_folder is None or prepared.draft is None:
        return None
    backend, draft = prepared.backend, prepared.draft
    vocabulary = _vocabulary(config, backend, prepared.tokenizer, draft, store)
    return _costs_before(config, backend, prepared.target_folder, prepared.draft_folder, vocabulary)


def _target_here(config: Config) -> Path | None:
    """The target's folder where it needs no download; learning does without the target."""
    try:
        return locate(config.models.target.name)
    except DraftloopError as error:
        logger.debug("what rounds cost is not known without the target: %s", error)
        return None


def _costs_before(
    config: Config,
    backend: Backend,
    target_folder: Path | None,
    draft_folder: Path,
    vocabulary: CutVocabulary | None,
) -> RoundCosts | None:
    """What a schedule would choose by, as measured before; a constant K is not chosen."""
    if config.speculative.schedule == "fixed" or target_folder is None:
        return None
    facts = calibration_facts(backend, target_folder, draft_folder, vocabulary)
    return nearest_costs(served_rounds(config), facts)


def served_rounds(config: Config) -> ServedRounds:
    """What the schedule prices: requests as the settings have them."""
    return ServedRounds(
        num_draft_tokens=config.speculative.num_draft_tokens,
        num_suffix_tokens=suffix_tokens(config),
        sampling=sampling_of(config),
        trace=config.storage.collect,
    )


def suffix_tokens(config: Config) -> int:
    """The most that a suffix match proposes in a round; 0 where none is looked for.

    Under `fixed` every round drafts K tokens by the model.
    """
    wanted = config.speculative.suffix.enabled and config.speculative.schedule == "adaptive"
    return config.speculative.suffix.max_draft_tokens if wanted else 0


def _schedule(
    config: Config, prepared: Prepared, models: Pair, vocabulary: CutVocabulary | None
) -> Schedule | None:
    """What chooses K, calibrated with the bare draft; None where K is constant."""
    if prepared.draft_folder is None or config.speculative.schedule == "fixed":
        return None
    folders = prepared.target_folder, prepared.draft_folder
    facts = calibration_facts(prepared.backend, *folders, vocabulary)
    return Schedule(calibrated_costs(models, served_rounds(config), facts))


def _suffixes(config: Config, store: Store | None) -> SuffixIndex | None:
    """What suffix matches are looked for in: the target's newest stored answers, and those to come."""
    if not suffix_tokens(config):
        return None
    index = SuffixIndex(MEGABYTE * config.speculative.suffix.megabytes // BYTES_PER_TOKEN)
    if store is not None:
        started_s = time.perf_counter()
        try:
            answers = store.requests.recent_answers(config.models.target.name, index.max_answer_tokens)
        except StorageError as error:
            logger.warning("past answers are not drafted from: %s", error)
            answers = []
        for answer in answers:
            index.add_answer(answer.tolist())
        logger.debug("%d past answers read in %.2f s", len(answers), time.perf_counter() - started_s)
    return index


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
