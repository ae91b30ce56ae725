"""What rounds cost here, remembered in a file of this machine, this pair and this way of serving.

Contract: what a busy moment disturbed is measured again at the next start, MOST_TRIES times at the most. A
file that is damaged, or is about something else, is replaced whole. Must not know settings or requests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.errors import DraftloopError
from draftloop.folders import cache_root
from draftloop.models.cache import read_json, write_json
from draftloop.models.folder import heads_digest
from draftloop.speculation.calibration import measure_costs
from draftloop.speculation.costs import RoundCosts
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from draftloop.backends.base import Backend
    from draftloop.backends.vocabulary import CutVocabulary
    from draftloop.speculation.calibration import ServedRounds
    from draftloop.speculation.stream import Pair

logger = logging.getLogger(__name__)

MOST_TRIES = 3
"""A machine that is never quiet, or too slow to time anything twice, shall not measure at every start."""
FORMAT = 5
_NUMBERS = ("draft_s", "draft_round_s", "read_s", "verify_more_s", "draft_more_s")

USUAL = (Sampling(), Sampling(temperature=1.0, top_p=0.9))


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a file says.

    Attributes:
        costs: the best known.
        tries: how often they were measured.
        steady: see `Measured`.
    """

    costs: RoundCosts
    tries: int
    steady: bool

    @property
    def settled(self) -> bool:
        """Whether they serve without being measured again."""
        return self.steady or self.tries >= MOST_TRIES


def calibrated_costs(
    pair: Pair,
    rounds: ServedRounds,
    facts: Mapping[str, str],
    clock: Callable[[], float] = time.perf_counter,
) -> RoundCosts:
    """The costs from the file of these facts, or measured now and stored there.

    Args:
        pair: with a draft.
        rounds: what is served.
        facts: all else that costs depend on: machine, backend, device, models.
        clock: seconds.
    """
    kept = _kept(rounds, facts)
    if kept is not None and kept.settled:
        logger.debug("round costs as measured before: %s", kept.costs)
        return kept.costs
    why = "once for this pair" if kept is None else "again: something else was busy before"
    logger.info("measuring what rounds cost here (%s)", why)
    started_s = time.perf_counter()
    measured = measure_costs(pair, rounds, clock)
    seconds = time.perf_counter() - started_s
    steady = "" if measured.steady else ", while something else was busy"
    logger.debug("round costs measured in %.1f s%s: %s", seconds, steady, measured.costs)
    now = _Kept(measured.costs, 1 if kept is None else kept.tries + 1, measured.steady)
    if kept is not None and not now.steady and _slowness(kept.costs, rounds) < _slowness(now.costs, rounds):
        now = replace(now, costs=kept.costs)
    key = {**facts, **rounds.facts}
    try:
        write_json(calibration_path(key), _stored(now, key, rounds.widest))
    except DraftloopError as error:
        logger.debug("the round costs were not stored: %s", error)
    return now.costs


def known_costs(rounds: ServedRounds, facts: Mapping[str, str]) -> RoundCosts | None:
    """The costs from the file of these facts; None where rounds so wide were never measured.

    What was measured for wider rounds tells narrower ones too.
    """
    kept = _kept(rounds, facts)
    return None if kept is None else kept.costs


def calibration_path(key: Mapping[str, str]) -> Path:
    """The file of one key, in Draftloop's cache."""
    text = json.dumps(dict(sorted(key.items())))
    return cache_root() / "calibration" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def calibration_facts(
    backend: Backend, target_folder: Path, draft_folder: Path, vocabulary: CutVocabulary | None
) -> dict[str, str]:
    """All that the costs of rounds depend on, beside the rounds."""
    capabilities = backend.capabilities()
    return {
        "machine": f"{platform.node()} {platform.machine()} {os.cpu_count()}",
        "backend": f"{capabilities.backend} {capabilities.version}",
        "draftloop": f"{version('draftloop')} {_code_digest()}",
        "device": capabilities.device,
        "target": heads_digest(target_folder),
        "draft": heads_digest(draft_folder),
        # Costs depend on how many rows the head has, not on which.
        "draft_vocabulary": "full" if vocabulary is None else str(len(vocabulary.ids)),
    }


def nearest_costs(served: ServedRounds, facts: Mapping[str, str]) -> RoundCosts | None:
    """As measured for these rounds, or else for rounds like them; None where none were.

    Who answers with flags of his own has measured under those, which is better than nothing;
    `RoundCosts.sampling` tells.
    """
    tried = (
        replace(served, sampling=sampling, trace=trace)
        for sampling in (served.sampling, *USUAL)
        for trace in (served.trace, not served.trace)
    )
    return next((costs for rounds in tried if (costs := known_costs(rounds, facts)) is not None), None)


def _code_digest() -> str:
    """Of the backends' sources: other kernels have other costs."""
    folder = Path(__file__).parents[1] / "backends"
    sources = sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".c", ".h", ".cu"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _slowness(costs: RoundCosts, rounds: ServedRounds) -> float:
    """Seconds of two rounds, without drafts and with all: what was measured quicker was disturbed less."""
    return costs.round_s(0) + costs.round_s(rounds.num_draft_tokens)


def _stored(kept: _Kept, key: Mapping[str, str], widest: int) -> dict[str, object]:
    costs = kept.costs
    return {
        "format": FORMAT,
        "key": dict(key),
        "widest": widest,
        "tries": kept.tries,
        "steady": kept.steady,
        "verify_s": [list(point) for point in costs.verify_s],
        **{name: getattr(costs, name) for name in _NUMBERS},
    }


def _kept(rounds: ServedRounds, facts: Mapping[str, str]) -> _Kept | None:
    """What the file says; None where it is damaged, about something else, or about narrower rounds."""
    key = {**facts, **rounds.facts}
    stored = read_json(calibration_path(key))
    widest, tries, steady = (stored.get(name) for name in ("widest", "tries", "steady"))
    if stored.get("format") != FORMAT or stored.get("key") != key:
        return None
    if not isinstance(widest, int) or widest < rounds.widest:
        return None
    costs = _costs_of(stored)
    if costs is None or not isinstance(tries, int) or not isinstance(steady, bool):
        return None
    return _Kept(replace(costs, sampling=rounds.sampling), tries, steady)


def _costs_of(stored: Mapping[str, object]) -> RoundCosts | None:
    """The costs of a file; None where they are damaged."""
    points, rest = stored.get("verify_s"), [stored.get(name) for name in _NUMBERS]
    try:
        verify_s = tuple((int(width), float(seconds)) for width, seconds in points)  # type: ignore[attr-defined]
        known = {name: float(value) for name, value in zip(_NUMBERS, rest, strict=True)}  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    widths = [width for width, _ in verify_s]
    numbers = [*known.values(), *(seconds for _, seconds in verify_s)]
    whole = widths[:1] == [1] and widths == sorted(set(widths))
    if not whole or not all(math.isfinite(number) and number >= 0 for number in numbers):
        return None
    return RoundCosts(verify_s=verify_s, **known) if verify_s[0][1] > 0 else None  # type: ignore[arg-type]
