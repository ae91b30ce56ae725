"""Clients that leave, stall and send rubbish: nothing breaks, nothing piles up.

At length: `python benchmarks/serving.py`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from servers import WAIT_S, Running, running
from traffic import Crowd, Target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

WARM_UP_REQUESTS, REQUESTS = 150, 250
MAX_TOKENS = 24
FLAT = 1.05
SETTINGS = {
    "backend": "numpy",
    "speculative.schedule": "fixed",
    # Small enough to be full before memory is looked at.
    "memory.prefix_cache_megabytes": 1,
    "models.target.max_kv_cache_tokens": 512,
    "models.draft.max_kv_cache_tokens": 512,
}


async def ask(target: Target, requests: int, seed: int) -> Crowd:
    crowd, left = Crowd(target, seed=seed), iter(range(requests))
    await crowd.ask(lambda: next(left, None) is not None)
    return crowd


async def soak(server: Running, target: Target) -> tuple[Crowd, dict[str, float], float]:
    """What came back, what was counted, and the memory at the end over that after the warm-up."""
    await ask(target, WARM_UP_REQUESTS, seed=1)
    await server.at_rest()
    before = server.resident_bytes
    crowd = await ask(target, REQUESTS, seed=2)
    counts = await asyncio.wait_for(server.at_rest(), WAIT_S)
    return crowd, counts, server.resident_bytes / before


def test_nothing_breaks_and_nothing_piles_up(
    toy_pair: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, draft = toy_pair()
    values = {**SETTINGS, "models.target.name": model, "models.draft.name": draft}
    options = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    with running(options, tmp_path) as server:
        prompts = tuple(f"Say {number} in words." for number in range(40))
        target = Target(server.port, server.model, MAX_TOKENS, prompts, too_many_words=400)
        crowd, counts, growth = asyncio.run(soak(server, target))
        server.process.terminate()
        assert server.process.wait(WAIT_S) == 0
    assert crowd.tally.wrong == []
    assert crowd.tally.server_errors == 0
    assert growth <= FLAT
    assert counts["requests_total cancelled"] > 0
    assert counts["requests_total failed"] == counts["kv_bytes"] == 0
    assert "Traceback" not in "".join(server.said)
