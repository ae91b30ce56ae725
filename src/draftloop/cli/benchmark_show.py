"""How the figures of a benchmark are told: JSON, tables, and a chart.

Contract: computes no figure; what is undefined is null in JSON and a dash for people. Must not know how a
mode was run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.cli.console import new_table, print_table, write
from draftloop.cli.examine import machine_facts, version_facts
from draftloop.cli.figures import rounded, setup_figures, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from draftloop.backends.base import Capabilities
    from draftloop.benchmarking.summary import Ratio, Summary
    from draftloop.config import Config

VERSIONED = ("numpy", "torch", "mlx", "mlx-lm", "transformers", "xllamacpp")
COUNTED = "tokens_per_s counts decoding alone; reading the prompt counts for no mode"
ALL_TASKS = "all"
RATIO_OF = "speculative/"


@dataclass(frozen=True, slots=True)
class Told:
    """A benchmark's outcome.

    Attributes:
        config: the settings.
        backend: ours.
        adapter: of the draft.
        seed: of every answer.
        descriptions: what each mode is.
        whole: figures of all prompts.
        tasks: figures by task.
    """

    config: Config
    backend: Capabilities
    adapter: str | None
    seed: int | None
    descriptions: Mapping[str, str]
    whole: Summary
    tasks: Mapping[str, Summary]


def benchmark_figures(told: Told) -> dict[str, Any]:
    """The JSON object (design §7)."""
    from draftloop.loading import sampling_of

    modes: dict[str, dict[str, Any]] = _summary_figures(told.whole)["modes"]
    sampling = sampling_of(told.config)
    return {
        "machine": machine_facts(),
        "versions": version_facts(VERSIONED),
        **setup_figures(told.config, told.backend.backend, told.adapter),
        "device": told.backend.device,
        "max_tokens": told.config.generation.max_tokens,
        "num_draft_tokens": told.config.speculative.num_draft_tokens,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
        },
        "seed": told.seed,
        "counted": COUNTED,
        **_summary_figures(told.whole),
        "modes": {name: {**figures, "is": told.descriptions[name]} for name, figures in modes.items()},
        "tasks": {name: _summary_figures(part) for name, part in told.tasks.items()},
    }


def show(told: Told) -> None:
    """Two tables on stdout: the modes, and the ratios by task."""
    modes = new_table("mode", "tok/s >", "tau >", "alpha >", "what it is")
    for name, figures in told.whole.modes.items():
        cells = (shown(figures.tokens_per_s, 2), shown(figures.tau, 2), shown(figures.alpha, 3))
        modes.add_row(name, *cells, told.descriptions[name])
    print_table(modes)
    write("\n")
    if told.whole.ratios:
        print_table(_ratio_table(told))
        write("\n")
    machine = machine_facts()
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    write(f"{machine['cpu']}, {machine['cores']} cores{gpu} · {COUNTED}\n")
    write(f"medians over prompts, with 95 % intervals of the ratios · {_conditions(told)}\n")


def write_plot(told: Told, path: Path) -> None:
    """Draw the ratios of all tasks into an SVG file, whole or not at all."""
    from draftloop.models.cache import new_file
    from draftloop.reporting.ratios import Bar, Group, draw_ratios

    groups = [
        Group(f"{task} ({part.prompts})", [_bar(Bar, name, ratio) for name, ratio in _told_ratios(part)])
        for task, part in _parts(told).items()
    ]
    models = told.config.models
    title, pair = "Decoding speed at the same prompt", f"{models.target.name} with {models.draft.name}"
    machine = machine_facts()
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores · {_conditions(told)}"
    notes = [where, "Bars are medians over prompts (their number in brackets), lines are 95 % intervals."]
    with new_file(path) as partial:
        partial.write_text(draw_ratios(title, pair, groups, notes), encoding="utf-8")


def _bar(bar: Any, name: str, ratio: Ratio) -> Any:
    return bar(name, ratio.median, ratio.low, ratio.high)


def _conditions(told: Told) -> str:
    tokens, temperature = told.config.generation.max_tokens, told.config.speculative.temperature
    return f"temperature {temperature:g}, at most {tokens} tokens an answer"


def _parts(told: Told) -> dict[str, Summary]:
    """The tasks and, where there are several, all of them together."""
    whole = {ALL_TASKS: told.whole} if len(told.tasks) > 1 else {}
    return {**told.tasks, **whole}


def _told_ratios(part: Summary) -> list[tuple[str, Ratio]]:
    """Those of our speculation; where it did not take part, all."""
    ours = [(name, ratio) for name, ratio in part.ratios.items() if name.startswith(RATIO_OF)]
    return ours or list(part.ratios.items())


def _ratio_table(told: Told) -> Any:
    table = new_table("task", "prompts >", "ratio", "median >", "low >", "high >")
    for task, part in _parts(told).items():
        for name, ratio in _told_ratios(part):
            cells = (shown(ratio.median, 2), shown(ratio.low, 2), shown(ratio.high, 2))
            table.add_row(task, str(part.prompts), name, *cells)
    return table


def _summary_figures(part: Summary) -> dict[str, Any]:
    return {
        "prompts": part.prompts,
        "modes": {
            name: {
                "tokens_per_s": rounded(mode.tokens_per_s, 2),
                "tau": rounded(mode.tau, 4),
                "alpha": rounded(mode.alpha, 4),
            }
            for name, mode in part.modes.items()
        },
        "ratios": {
            name: {
                "median": rounded(ratio.median, 4),
                "low": rounded(ratio.low, 4),
                "high": rounded(ratio.high, 4),
            }
            for name, ratio in part.ratios.items()
        },
    }
