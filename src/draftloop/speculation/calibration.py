"""What rounds cost on this machine: measured once through the models' seam, and remembered in a file.

Contract: a few seconds at most, on scratch caches; nobody may be answering. A file that is damaged, or is
about something else, is measured again and replaced whole. Must not know settings or requests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import time
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.errors import DraftloopError
from draftloop.folders import cache_root
from draftloop.models.cache import read_json, write_json
from draftloop.speculation.costs import RoundCosts
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from draftloop.backends.base import Cache, Model
    from draftloop.speculation.stream import Pair

logger = logging.getLogger(__name__)

BUDGET_S = 2.5
"""No further pass begins after so long."""
FEWEST_PASSES, MOST_PASSES = 2, 8
CONTEXT_TOKENS, READ_TOKENS = 64, 48
"""What a token of a backlog costs is the difference between reading so many and half of them: on a GPU both
are beyond what a graph was recorded for, as a backlog is."""
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48, 64)
"""Those below the widest round are measured, that round and K + 1; kernels work in blocks, so the small ones
matter each."""
FORMAT = 1

_NUMBERS = ("draft_s", "draft_round_s", "read_s")


def measure_costs(
    pair: Pair, cap: int, clock: Callable[[], float] = time.perf_counter, *, suffix_tokens: int = 0
) -> RoundCosts:
    """Time the target's steps and the draft's, in turn, and keep each one's quickest: what nobody disturbed.

    Args:
        pair: with a draft. Its caches must hold CONTEXT_TOKENS, or as many as there are, less a round.
        cap: K, at least 1.
        clock: seconds.
        suffix_tokens: the most that is proposed without a model; as many are verified as the cache holds.
    """
    if pair.draft is None:
        raise ValueError("without a draft there is nothing to choose")
    widths = _widths(cap, min(suffix_tokens, pair.target.new_cache().max_tokens - 2))
    target, draft = _filled(pair.target, max(widths)), _filled(pair.draft, max(cap, READ_TOKENS))
    most = min(READ_TOKENS, draft.max_tokens - draft.position)
    few, many = 1, max(cap, 2)
    steps: list[Callable[[], None]] = [
        *(_verification(pair.target, target, width) for width in widths),
        *(_proposal(pair.draft, draft, k) for k in (few, many)),
        *(_proposal(pair.draft, draft, 1, unread_tokens=count) for count in (most // 2, most)),
    ]
    best = [math.inf] * len(steps)
    started_s = clock()
    for step in steps:
        step()
    for done in range(MOST_PASSES):
        if done >= FEWEST_PASSES and clock() - started_s > BUDGET_S:
            break
        for index, step in enumerate(steps):
            before_s = clock()
            step()
            best[index] = min(best[index], clock() - before_s)
    # A wider step is never cheaper; where it was, the clock jittered.
    verify_s = itertools.accumulate(best[: len(widths)], max)
    few_s, many_s, half_s, whole_s = best[len(widths) :]
    draft_s = min(max(0.0, many_s - few_s) / (many - few), few_s)
    return RoundCosts(
        verify_s=tuple(zip(widths, verify_s, strict=True)),
        draft_s=draft_s,
        draft_round_s=few_s - draft_s,
        read_s=max(0.0, whole_s - half_s) / (most - most // 2),
    )


def calibrated_costs(
    pair: Pair,
    cap: int,
    facts: Mapping[str, str],
    clock: Callable[[], float] = time.perf_counter,
    *,
    suffix_tokens: int = 0,
) -> RoundCosts:
    """The costs from the file of these facts, or measured now and stored there.

    Args:
        pair: with a draft.
        cap: K.
        facts: all that costs depend on: machine, backend, device, models.
        clock: seconds.
        suffix_tokens: see `measure_costs`.
    """
    known = known_costs(cap, facts, suffix_tokens)
    if known is not None:
        logger.debug("round costs as measured before: %s", known)
        return known
    key = _key(cap, facts, suffix_tokens)
    started_s = time.perf_counter()
    costs = measure_costs(pair, cap, clock, suffix_tokens=suffix_tokens)
    logger.debug("round costs measured in %.1f s: %s", time.perf_counter() - started_s, costs)
    try:
        write_json(calibration_path(key), _stored(costs, key))
    except DraftloopError as error:
        logger.debug("the round costs were not stored: %s", error)
    return costs


def known_costs(cap: int, facts: Mapping[str, str], suffix_tokens: int) -> RoundCosts | None:
    """The costs from the file of these facts (see `calibrated_costs`); None where nobody measured them."""
    key = _key(cap, facts, suffix_tokens)
    return _costs_of(read_json(calibration_path(key)), key)


def _key(cap: int, facts: Mapping[str, str], suffix_tokens: int) -> dict[str, str]:
    return {**facts, "num_draft_tokens": str(cap), "suffix_tokens": str(suffix_tokens)}


def calibration_path(key: Mapping[str, str]) -> Path:
    """The file of one key, in Draftloop's cache."""
    text = json.dumps(dict(sorted(key.items())))
    return cache_root() / "calibration" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _stored(costs: RoundCosts, key: Mapping[str, str]) -> dict[str, object]:
    return {
        "format": FORMAT,
        "key": dict(key),
        "verify_s": [list(point) for point in costs.verify_s],
        "draft_s": costs.draft_s,
        "draft_round_s": costs.draft_round_s,
        "read_s": costs.read_s,
    }


def _costs_of(stored: Mapping[str, object], key: Mapping[str, str]) -> RoundCosts | None:
    """What a file says; None where it is damaged or about something else."""
    if stored.get("format") != FORMAT or stored.get("key") != dict(key):
        return None
    points, rest = stored.get("verify_s"), [stored.get(name) for name in _NUMBERS]
    try:
        verify_s = tuple((int(width), float(seconds)) for width, seconds in points)  # type: ignore[attr-defined]
        draft_s, draft_round_s, read_s = (float(value) for value in rest)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    widths = [width for width, _ in verify_s]
    numbers = [draft_s, draft_round_s, read_s, *(seconds for _, seconds in verify_s)]
    whole = widths[:1] == [1] and widths == sorted(set(widths))
    if not whole or not all(math.isfinite(number) and number >= 0 for number in numbers):
        return None
    return RoundCosts(verify_s, draft_s, draft_round_s, read_s) if verify_s[0][1] > 0 else None


def _widths(cap: int, suffix_tokens: int) -> list[int]:
    """What is verified: WIDTHS as far as rounds go, and the widest round of either drafter."""
    widest = max(cap, suffix_tokens) + 1
    return sorted({*(width for width in WIDTHS if width < widest), cap + 1, widest})


def _filled(model: Model, room: int) -> Cache:
    """A scratch cache that holds a short text and has room for `room` more."""
    cache = model.new_cache()
    context = max(1, min(CONTEXT_TOKENS, cache.max_tokens - room))
    model.prefill([PrefillJob(cache, [1] * context)])
    return cache


def _verification(target: Model, cache: Cache, width: int) -> Callable[[], None]:
    k = width - 1
    proposal = Proposal(tokens=(1,) * k, q=None, num_tokens=k) if k else NO_PROPOSAL
    job = VerifyJob(
        cache=cache,
        last=1,
        proposal=proposal,
        rules=Rules(Sampling()),
        accept_uniforms=np.zeros(k, np.float32),
        extra_uniforms=np.zeros(width, np.float32),
    )

    def step() -> None:
        position = cache.position
        target.verify([job])
        cache.trim(cache.position - position)

    return step


def _proposal(draft: Model, cache: Cache, k: int, unread_tokens: int = 1) -> Callable[[], None]:
    job = ProposeJob(cache, [1] * unread_tokens, k, Rules(Sampling()), np.zeros(k, np.float32))

    def step() -> None:
        position = cache.position
        proposal = draft.propose([job])[0]
        # A device works ahead of the host; reading a token waits for it.
        int(proposal.tokens[-1])
        cache.trim(cache.position - position)

    return step
