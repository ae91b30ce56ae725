"""`draftloop benchmark`: speed beside the target alone and beside other programs, in one run.

Contract: stores nothing; everything that can be wrong with the input is found before a model is loaded. Must
not know how a mode decodes.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftloop.cli import options
from draftloop.cli.asking import (
    AnswerOptions,
    load_models,
    open_store_for,
    prepare_models,
    read_options,
    request_for,
    with_fixed_adapter,
)
from draftloop.cli.console import say, write_json
from draftloop.cli.figures import shown
from draftloop.cli.progress import Bars, counting, waiting
from draftloop.cli.prompts import Prompt, by_task, limited, read_prompts
from draftloop.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draftloop.benchmarking.child import PeerSetup
    from draftloop.benchmarking.contenders import Answer, Contender, Job
    from draftloop.benchmarking.peers import Peer
    from draftloop.engine import Engine
    from draftloop.loading import Prepared

TARGET, SPECULATIVE, DRAFT, SUFFIX = OUR_MODES = ("target", "speculative", "draft", "suffix")
INSTALLED = "installed"
BEST_SUFFIX = " best"

Modes = Annotated[
    str,
    typer.Option(
        "--modes",
        metavar="LIST",
        help="What is measured, separated by commas: target, speculative; its parts draft (the model "
        "alone) and suffix (suffix matches alone); and modes of peers "
        "(llama.cpp, llama.cpp+draft, mlx-lm, transformers).",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="LIST",
        help="Peers to add with all their modes: llama.cpp, mlx-lm, transformers; or installed, "
        "for those that are.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N prompts of each task.")
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the ratios, as an .svg file.")
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The modes, in order; the peer of each that has one; and what each loads."""

    modes: tuple[str, ...]
    peers: Mapping[str, Peer]
    setups: Mapping[str, PeerSetup]


def benchmark(
    context: typer.Context,
    *,
    prompts_file: options.EveryPrompt,
    modes: Modes = "target,speculative",
    against: Against = None,
    limit: Limit = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = 0,
    num_draft_tokens: options.NumDraftTokens = None,
    adapter: options.Adapter = None,
    plot: Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure speed on a file of prompts, mode against mode, prompt by prompt; store nothing."""
    flags = options.AnswerFlags(system=system, seed=seed, no_collect=True, adapter=adapter)
    asked = read_options(context, flags)
    check_plot(plot)
    _check_suffix(modes, asked)
    peers = _peers_of(names := _named(modes, "--modes"), against)
    names = [*names, *(mode for mode in peers if mode not in names)]
    asked = replace(asked, with_draft=set(names) != {TARGET})
    prompts = limited(read_prompts(prompts_file), limit)
    with open_store_for(asked) as store, ExitStack() as stack:
        asked = with_fixed_adapter(asked, store)
        prepared = prepare_models(asked)
        jobs = [_job(asked, prepared, prompt) for prompt in prompts]
        wanted = _with_setups(names, peers, asked, prepared, all_named=against != INSTALLED)
        ours = any(mode in OUR_MODES for mode in wanted.modes)
        engine = load_models(asked.config, prepared, store, adapter=asked.adapter) if ours else None
        contenders = [_open(mode, wanted, asked, engine, stack) for mode in wanted.modes]
        answers = _measure(contenders, jobs)
    worn = None if engine is None else engine.adapter
    _tell(asked, prepared, prompts, contenders, answers, adapter=worn, plot=plot, as_json=as_json)


def _tell(
    asked: AnswerOptions,
    prepared: Prepared,
    prompts: Sequence[Prompt],
    contenders: Sequence[Contender],
    answers: Sequence[Mapping[str, Answer]],
    *,
    adapter: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from draftloop.benchmarking.summary import add_best, summarize
    from draftloop.cli.benchmark_show import Told, benchmark_figures, show, write_plot

    derived = _derived([contender.name for contender in contenders])
    for best, of in derived.items():
        answers = [add_best(one, best, of) for one in answers]
    told = Told(
        config=asked.config,
        backend=prepared.backend.capabilities(),
        adapter=adapter,
        seed=asked.seed,
        descriptions={contender.name: contender.description for contender in contenders}
        | {best: f"at each prompt the faster of {' and '.join(of)}" for best, of in derived.items()},
        whole=summarize(answers, derived),
        tasks={name: summarize(part, derived) for name, part in by_task(prompts, answers).items()},
    )
    if as_json:
        write_json(benchmark_figures(told))
    else:
        show(told)
    if plot is not None:
        write_plot(told, plot)
        say(f"the chart is in {plot}")


def check_plot(path: Path | None) -> None:
    """Whether the chart can be written.

    Raises:
        InputError: it is no .svg file, or its folder does not exist.
    """
    if path is None:
        return
    if path.suffix.lower() != ".svg":
        raise InputError(f"--plot {path} is no .svg file", remedy="The chart is SVG: name it so.")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.parent}", remedy="Make it first.")


def _check_suffix(modes: str, asked: AnswerOptions) -> None:
    """Whether what the mode `suffix` measures is there.

    Raises:
        InputError: the settings switch it off.
    """
    if SUFFIX in _named(modes, "--modes") and not asked.num_suffix_tokens:
        raise InputError(
            "--modes suffix: the settings draft from no suffix match",
            remedy="Set speculative.suffix.enabled to true and speculative.schedule to adaptive.",
        )


def _named(text: str, flag: str) -> list[str]:
    """The names of a list, each once."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"{flag} {text!r} has an empty name", remedy="Separate names by single commas.")
    return list(dict.fromkeys(names))


def _peers_of(modes: Sequence[str], against: str | None) -> dict[str, Peer]:
    """The peer of every peer's mode that is asked for.

    Raises:
        InputError: a mode or a peer is unknown, or not installed.
    """
    from draftloop.benchmarking import peers

    found = {}
    for mode in modes:
        if mode in OUR_MODES:
            continue
        peer = peers.peer_of_mode(mode)
        if peer is None:
            known = ", ".join((*OUR_MODES, *peers.peer_modes()))
            raise InputError(f"--modes {mode}: there is no such mode", remedy=f"Choose from {known}.")
        found[mode] = peer
    added = []
    if against == INSTALLED:
        added = peers.installed_peers()
    elif against is not None:
        added = [peers.peer_named(name) for name in _named(against, "--against")]
    return found | {mode: peer for peer in added for mode in peer.modes}


def _job(asked: AnswerOptions, prepared: Prepared, prompt: Prompt) -> Job:
    from draftloop.benchmarking.contenders import Job

    request = request_for(asked, prepared.tokenizer, prompt)
    return Job(tuple(request.prompt_tokens), request.max_tokens, request.sampling, asked.seed or 0)


def _with_setups(
    names: Sequence[str],
    peers: Mapping[str, Peer],
    asked: AnswerOptions,
    prepared: Prepared,
    *,
    all_named: bool,
) -> Wanted:
    """What each peer's mode loads. One that was not named is left out where it cannot read this pair."""
    from draftloop.benchmarking.child import PeerSetup, usable_cores
    from draftloop.benchmarking.peers import peer_setup

    setup = PeerSetup(
        target=prepared.target_folder,
        draft=prepared.draft_folder,
        num_draft_tokens=asked.config.speculative.num_draft_tokens,
        max_context_tokens=asked.config.models.target.max_kv_cache_tokens,
        threads=usable_cores(),
        device=asked.config.device,
        eos_token_ids=tuple(sorted(prepared.tokenizer.eos_token_ids)),
    )
    setups: dict[str, PeerSetup] = {}
    for mode, peer in peers.items():
        try:
            setups[mode] = peer_setup(peer, mode, setup, asked.config, Bars())
        except InputError as error:
            if all_named:
                raise
            say(f"note: without {mode}: {error}")
    kept = tuple(name for name in names if name in OUR_MODES or name in setups)
    return Wanted(kept, peers, setups)


def _open(
    mode: str, wanted: Wanted, asked: AnswerOptions, engine: Engine | None, stack: ExitStack
) -> Contender:
    from draftloop.benchmarking.contenders import Ours
    from draftloop.benchmarking.peers import open_peer

    if engine is None or mode not in OUR_MODES:
        with waiting(f"loading {mode}"):
            return stack.enter_context(open_peer(wanted.peers[mode], mode, wanted.setups[mode]))
    capabilities = engine.backend.capabilities()
    name = f"draftloop, {capabilities.backend} {capabilities.version} on {capabilities.device}"
    k = asked.config.speculative.num_draft_tokens if mode in (SPECULATIVE, DRAFT) else 0
    matched = asked.num_suffix_tokens if mode in (SPECULATIVE, SUFFIX) else 0
    worn = f"adapter {engine.adapter}" if engine.adapter else "no adapter"
    parts = [f"up to {k} draft tokens, {worn}"] if k else []
    parts += [f"suffix matches of up to {matched} tokens"] if matched else []
    told = ", ".join(parts) or "the target alone"
    return Ours(mode, f"{name}, {told}", engine, engine.experience.anew(), k, matched)


def _measure(contenders: Sequence[Contender], jobs: Sequence[Job]) -> list[Mapping[str, Answer]]:
    from draftloop.benchmarking.run import interleave

    total = len(jobs) * len(contenders)
    with counting("measuring", total, shown=True, lines=True) as counter:
        return list(
            interleave(
                contenders,
                jobs,
                lambda name, answer: counter.advance(f"{name} {shown(answer.tokens_per_s, 1)} tok/s"),
            )
        )


def _derived(modes: Sequence[str]) -> dict[str, list[str]]:
    """The best mode of each peer that takes part with several."""
    from draftloop.benchmarking.peers import PEERS

    parts = {f"{peer.name}{BEST_SUFFIX}": [mode for mode in modes if mode in peer.modes] for peer in PEERS}
    return {best: of for best, of in parts.items() if len(of) > 1}
