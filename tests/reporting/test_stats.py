"""The figures of `stats`, against the store they are read from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from draftloop.config import Config
from draftloop.reporting.stats import read_stats
from draftloop.storage.records import PairKey
from draftloop.storage.store import open_store
from reporting.sample import PAIR

if TYPE_CHECKING:
    from pathlib import Path


def test_requests_are_counted_as_training_sorts_them(filled_directory: Path) -> None:
    with open_store(filled_directory, max_megabytes=1000, read_only=True) as store:
        requests = store.requests.list(PAIR)
        stats = read_stats(store, PAIR, Config())
        stored_bytes = store.requests.stored_bytes()
    assert stats.failures + stats.replay + stats.held_out == stats.figures.requests == 400
    assert stats.held_out == sum(one.held_out for one in requests)
    below = [one for one in requests if one.drafted_tokens and one.accepted_tokens / one.drafted_tokens < 0.5]
    assert stats.failures == sum(not one.held_out and one.trained_by is None for one in below)
    assert any(one.trained_by for one in below)
    assert stats.threshold == 0.5
    assert stats.stored_bytes == stored_bytes
    assert stats.adapter == "a0001"
    assert stats.now.requests == 50
    assert stats.last_run is not None


def test_blocks_and_domains_hold_every_request_with_drafts(filled_directory: Path) -> None:
    with open_store(filled_directory, max_megabytes=1000, read_only=True) as store:
        stats = read_stats(store, PAIR, Config())
    assert sum(one.figures.requests for one in stats.blocks) == 388
    times = [time for one in stats.blocks for time in (one.first_s, one.last_s)]
    assert times == sorted(times)
    assert sum(one.figures.drafted_requests for one in stats.domains) == 388
    alphas = [one.figures.alpha or 0 for one in stats.domains]
    assert alphas == sorted(alphas)


def test_another_pair_has_the_same_keys_and_nothing_in_them(filled_directory: Path) -> None:
    with open_store(filled_directory, max_megabytes=1000, read_only=True) as store:
        full = read_stats(store, PAIR, Config()).to_json()
        other = read_stats(store, PairKey("other", "pair"), Config()).to_json()
    assert full.keys() == other.keys()
    json.dumps([full, other], allow_nan=False)
    assert (other["requests"], other["alpha"], other["blocks"], other["adapter"]) == (0, None, [], None)
    assert other["other_pairs"] == [{"target": PAIR.target, "draft": PAIR.draft, "requests": 400}]
    assert full["other_pairs"] == []
