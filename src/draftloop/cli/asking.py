"""From flags and settings to requests: what the commands that answer share.

Contract: checks everything that needs no model first, then the store, then loads. Must not know where an
answer is shown.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftloop.cli import options
from draftloop.cli.console import say
from draftloop.cli.progress import Bars, waiting
from draftloop.cli.prompts import THE_PROMPT, Prompt
from draftloop.errors import ContextFull, InputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import typer

    from draftloop.config import Config
    from draftloop.engine import Engine, Request
    from draftloop.learning.recorder import Provenance
    from draftloop.loading import Prepared
    from draftloop.models.messages import Message
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.storage.store import Store

ACTIVE_ADAPTER, NO_ADAPTER = "active", "none"
"""The values of `--adapter` that are no adapter's name (`loading.ACTIVE`, `loading.NONE`)."""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are made.

    Attributes:
        config: the settings, the flags' values included; `storage.collect` is false after `--no-collect`.
        system: the system message; "" means none.
        stop: stop strings.
        seed: of every answer; None draws a new one each time.
        with_draft: False asks the target alone.
        adapter: the draft's: `active`, `none`, or a name.
        source: the command, as it is stored beside an answer.
    """

    config: Config
    system: str
    stop: tuple[str, ...] = ()
    seed: int | None = None
    with_draft: bool = True
    adapter: str = ACTIVE_ADAPTER
    source: str = ""

    @property
    def num_suffix_tokens(self) -> int:
        """The most that a suffix match may propose; 0 where none is looked for."""
        from draftloop.loading import suffix_tokens

        return suffix_tokens(self.config) if self.with_draft else 0

    def request(self, prompt_tokens: Sequence[int], provenance: Provenance | None = None) -> Request:
        """Ask for the answer to these tokens; without a provenance it is not stored."""
        from draftloop.engine import Request
        from draftloop.loading import sampling_of

        return Request(
            prompt_tokens=prompt_tokens,
            sampling=sampling_of(self.config),
            max_tokens=self.config.generation.max_tokens,
            min_tokens=self.config.generation.min_tokens,
            num_draft_tokens=self.config.speculative.num_draft_tokens if self.with_draft else 0,
            num_suffix_tokens=self.num_suffix_tokens,
            stop=self.stop,
            seed=self.seed,
            provenance=provenance,
        )


def read_options(
    context: typer.Context, flags: options.AnswerFlags, *, defaults: Sequence[str] = ()
) -> AnswerOptions:
    """Check the flags and read the settings under them; `defaults` as in `options.load_settings`.

    Raises:
        InputError: a flag is wrong, or contradicts another one.
    """
    drafts = "--num-draft-tokens" in options.flags_given(context)
    options.refuse_together(
        {"--no-speculation": flags.no_speculation, "--num-draft-tokens": drafts},
        "Without speculation nothing is drafted.",
    )
    options.refuse_together(
        {"--no-speculation": flags.no_speculation, "--adapter": flags.adapter is not None},
        "Without speculation there is no draft to wear it.",
    )
    stops = options.check_stops(flags.stop)
    for text, name in ((flags.system, "--system"), (flags.adapter, "--adapter")):
        options.check_text(text or "", name)
    forced = ["storage.collect=false"] if flags.no_collect else []
    config = options.load_settings(context, defaults=defaults, forced=forced).config
    return AnswerOptions(
        config=config,
        system=(config.chat.system_message or "") if flags.system is None else flags.system,
        stop=stops,
        seed=flags.seed,
        with_draft=not flags.no_speculation,
        adapter=ACTIVE_ADAPTER if flags.adapter is None else flags.adapter,
        source=context.info_name or "",
    )


@contextmanager
def open_store_for(asked: AnswerOptions) -> Iterator[Store | None]:
    """The store that the answers need; None where they need none.

    Where nothing is collected it is only read, and only to learn which adapter to wear and what to cut the
    draft's head to: none is created, and one that cannot be read costs both, said in one line.

    Raises:
        StorageError: it cannot be used.
        InputError: there is no adapter of the name asked for.
    """
    store = _open_store(asked)
    if store is None:
        if _names_an_adapter(asked):
            raise _no_such_adapter(asked)
        yield None
        return
    with store:
        if _names_an_adapter(asked):
            _check_adapter(asked, store)
        yield store


def _open_store(asked: AnswerOptions) -> Store | None:
    from pathlib import Path

    from draftloop.loading import open_storage
    from draftloop.storage.store import DATABASE_NAME

    config = asked.config
    if config.storage.collect:
        return open_storage(config)
    learnt = asked.adapter != NO_ADAPTER or config.speculative.draft_vocabulary != "full"
    if not (asked.with_draft and learnt and (Path(config.storage.directory) / DATABASE_NAME).exists()):
        return None
    try:
        return open_storage(config, read_only=True)
    except StorageError as error:
        if _names_an_adapter(asked):
            raise StorageError(error.what, remedy="With --adapter none the bare draft answers.") from None
        lacking = "an adapter" if asked.adapter == ACTIVE_ADAPTER else "what answers taught"
        say(f"note: the draft goes without {lacking}: {error.what}")
        return None


def _names_an_adapter(asked: AnswerOptions) -> bool:
    return asked.with_draft and asked.adapter not in (ACTIVE_ADAPTER, NO_ADAPTER)


def _check_adapter(asked: AnswerOptions, store: Store) -> None:
    record, draft = store.adapters.get(asked.adapter), asked.config.models.draft.name
    if record is None:
        raise _no_such_adapter(asked)
    if record.pair.draft != draft:
        raise InputError(
            f"the adapter {asked.adapter} was made for the draft {record.pair.draft}, not for {draft}",
            remedy="draftloop adapters list names those of this pair.",
        )


def _no_such_adapter(asked: AnswerOptions) -> InputError:
    return InputError(
        f"there is no adapter {asked.adapter!r} (--adapter)", remedy="draftloop adapters list names them."
    )


def with_fixed_adapter(asked: AnswerOptions, store: Store | None) -> AnswerOptions:
    """The active adapter by its name: a promotion meanwhile must not mix two drafts in one figure."""
    from draftloop.loading import pair_of

    if asked.adapter != ACTIVE_ADAPTER or store is None:
        return asked
    active = store.adapters.active(pair_of(asked.config))
    return replace(asked, adapter=NO_ADAPTER if active is None else active.name)


def prepare_models(asked: AnswerOptions) -> Prepared:
    """Get the models onto this machine, with bars, and check that they fit; no draft where none is asked."""
    with waiting("preparing the models"):
        from draftloop.loading import prepare
    return prepare(asked.config, Bars(), with_draft=asked.with_draft)


def load_models(
    config: Config,
    prepared: Prepared,
    store: Store | None = None,
    *,
    adapter: str = ACTIVE_ADAPTER,
    lines: bool = False,
) -> Engine:
    """Load what `prepare_models` found.

    Args:
        config: the settings.
        prepared: the models.
        store: of `open_store_for`; without one nothing is stored and the draft is bare.
        adapter: the draft's.
        lines: say it also where no terminal shows it.
    """
    from draftloop.loading import load_prepared

    with waiting("loading the models", lines=lines):
        return load_prepared(config, prepared, store, adapter=adapter)


def request_for(
    asked: AnswerOptions, tokenizer: Tokenizer, prompt: Prompt, *, raw: bool = False, key: str | None = None
) -> Request:
    """Ask for the answer to one prompt.

    Args:
        asked: how.
        tokenizer: of the pair.
        prompt: its own system message wins over that of `asked`.
        raw: go on with the text itself, without a chat template.
        key: names the prompt in the store.

    Raises:
        ContextFull: it leaves no room for an answer; says which one it is.
    """
    from draftloop.learning.recorder import Provenance, domain_of
    from draftloop.models.messages import Message
    from draftloop.speculation.stream import check_fits

    system = "" if raw else system_of(asked, prompt)
    if raw:
        tokens = tokenizer.encode(prompt.text, add_special_tokens=True)
    else:
        tokens = tokenizer.chat_tokens(framed(system, [Message("user", prompt.text)]))
    try:
        check_fits(len(tokens), asked.config.models.target.max_kv_cache_tokens)
    except ContextFull as error:
        if prompt.where == THE_PROMPT:
            raise
        raise ContextFull(f"{prompt.where}: {error.what}", remedy=error.remedy) from None
    return asked.request(tokens, Provenance(domain_of(system, prompt.task), asked.source, key))


def system_of(asked: AnswerOptions, prompt: Prompt) -> str:
    """The system message of a prompt."""
    return asked.system if prompt.system is None else prompt.system


def framed(system: str, turns: Sequence[Message]) -> list[Message]:
    """The turns behind the system message, if there is one."""
    from draftloop.models.messages import Message

    return [*([Message("system", system)] if system else []), *turns]
