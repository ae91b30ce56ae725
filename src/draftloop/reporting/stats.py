"""What `draftloop stats` tells: counts, sizes, alpha over time, the worst domains, what training waits for.

Contract: reads summaries only, no traces, so that it is quick. `Stats.to_json` has the same keys whatever
is stored. Must not know how it is shown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.learning.selection import select
from draftloop.reporting.figures import blocks_of, domains_of, drafted_of, figures_of
from draftloop.reporting.overview import NOW_REQUESTS, training_state
from draftloop.storage.records import AdapterStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draftloop.config import Config
    from draftloop.reporting.figures import Domain, Figures, SuffixFigures
    from draftloop.storage.records import PairKey, RunRecord
    from draftloop.storage.store import Store

BLOCKS = 8
WORST_DOMAINS = 5


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive requests with drafts; Unix times of the first and the last."""

    figures: Figures
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class Stats:
    """One pair's part of a store.

    Attributes:
        pair: the two models.
        figures: over all requests.
        now: over the newest with drafts under the active adapter.
        bare: over those that the bare draft drafted for.
        failures, replay, held_out: requests, as training sorts them.
        validation: those held out that choose a checkpoint; the others are the gate's.
        needed: failures that training waits for.
        threshold: acceptance rate that separates failures from replay.
        waiting: what training waits for, in words.
        stored_bytes: of the requests of all pairs.
        max_megabytes: the bound on them, in millions of bytes.
        blocks: the requests with drafts in parts as large as each other, oldest first.
        domains: those with drafts, the lowest alpha first.
        adapter: the active one's name; None is the bare draft.
        adapters: how many there are of each status.
        last_run: the newest training run.
        other_pairs: pairs with requests, with their number.
    """

    pair: PairKey
    figures: Figures
    now: Figures
    bare: Figures
    failures: int
    replay: int
    held_out: int
    validation: int
    needed: int
    threshold: float
    waiting: str
    stored_bytes: int
    max_megabytes: int
    blocks: Sequence[Block]
    domains: Sequence[Domain]
    adapter: str | None
    adapters: Counter[AdapterStatus]
    last_run: RunRecord | None
    other_pairs: dict[PairKey, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        run = self.last_run
        return {
            "models": {"target": self.pair.target, "draft": self.pair.draft},
            **_counts(self.figures),
            **_metrics(self.figures),
            "suffix": _suffix(self.figures.suffix),
            "now": {**_counts(self.now), **_metrics(self.now)},
            "bare_draft": {**_counts(self.bare), **_metrics(self.bare)},
            "failures": self.failures,
            "min_failure_cases": self.needed,
            "replay": self.replay,
            "held_out": self.held_out,
            "validation": self.validation,
            "acceptance_threshold": self.threshold,
            "training": self.waiting,
            "stored_bytes": self.stored_bytes,
            "max_megabytes": self.max_megabytes,
            "blocks": [
                {
                    "first_s": one.first_s,
                    "last_s": one.last_s,
                    **_counts(one.figures),
                    **_metrics(one.figures),
                }
                for one in self.blocks
            ],
            "domains": {one.name: {**_counts(one.figures), **_metrics(one.figures)} for one in self.domains},
            "adapter": self.adapter,
            "adapters": {status.value: self.adapters[status] for status in AdapterStatus},
            "last_run": None
            if run is None
            else {"id": run.id, "status": run.status.value, "reason": run.result.get("reason")},
            "other_pairs": [
                {"target": pair.target, "draft": pair.draft, "requests": requests}
                for pair, requests in self.other_pairs.items()
            ],
        }


def read_stats(store: Store, pair: PairKey, config: Config) -> Stats:
    """Read what is stored of `pair`.

    Raises:
        StorageError: the database is damaged or cannot be read.
    """
    requests = store.requests.list(pair)
    drafted = drafted_of(requests)
    selection = select(store, pair, config)
    active = store.adapters.active(pair)
    adapter = None if active is None else active.name
    with_drafts = [one for one in domains_of(requests) if one.figures.alpha is not None]
    return Stats(
        pair=pair,
        figures=figures_of(requests),
        now=figures_of([one for one in drafted if one.adapter == adapter][-NOW_REQUESTS:]),
        bare=figures_of([one for one in drafted if one.adapter is None]),
        failures=len(selection.failures),
        replay=len(selection.replay),
        held_out=len(selection.validation) + len(selection.gate),
        validation=len(selection.validation),
        needed=selection.needed,
        threshold=selection.threshold,
        waiting=training_state(selection, config.speculative.acceptance_threshold, len(drafted)),
        stored_bytes=store.requests.stored_bytes(),
        max_megabytes=config.storage.max_megabytes,
        blocks=[
            Block(figures_of(block), block[0].created_s, block[-1].created_s)
            for block in blocks_of(drafted, BLOCKS)
        ],
        domains=sorted(with_drafts, key=lambda one: (one.figures.alpha or 0.0, one.name)),
        adapter=adapter,
        adapters=Counter(one.status for one in store.adapters.list(pair)),
        last_run=store.runs.latest(pair),
        other_pairs={other: count for other, count in store.requests.pairs().items() if other != pair},
    )


def _counts(figures: Figures) -> dict[str, int]:
    return {
        "requests": figures.requests,
        "drafted_requests": figures.drafted_requests,
        "tokens": figures.tokens,
    }


def _suffix(figures: SuffixFigures) -> dict[str, float | None]:
    return {
        "rounds": figures.rounds,
        "tokens": figures.tokens,
        "drafted_tokens": figures.drafted_tokens,
        "accepted_tokens": figures.accepted_tokens,
        **_rounded({"acceptance_rate": figures.acceptance_rate, "tau": figures.tau}),
        **_rounded({"tokens_per_s": figures.tokens_per_s, "share": figures.share}),
    }


def _metrics(figures: Figures) -> dict[str, float | None]:
    return _rounded({"alpha": figures.alpha, "tau": figures.tau, "acceptance_rate": figures.acceptance_rate})


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in values.items()}
