"""Whether a trained adapter becomes the active one, decided from replayed held-out requests alone.

Contract: pure: the same figures and seed give the same verdict, and a refusal says why. Must not know how
the figures were measured, nor what follows from the verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.learning.intervals import bootstrap_interval
from draftloop.learning.replayed import BARE, CANDIDATE, INCUMBENT, Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from draftloop.learning.replayed import ReplayedRequest, RoundCost

MIN_REQUESTS = 5
MAX_DOMAIN_LOSS = 0.01
"""One point of alpha."""
SHARP_ERROR = 0.005
"""A standard error of half a point or less: a loss of one point can be told from none."""


@dataclass(frozen=True, slots=True)
class DomainFigures:
    """One domain's held-out requests under the incumbent (before) and the candidate (after)."""

    requests: int
    rows: int
    alpha_before: float | None
    alpha_after: float | None
    tau_before: float | None
    tau_after: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says. Figures are None where there was nothing to measure.

    Attributes:
        promote: whether the candidate becomes active.
        reason: one sentence with the numbers that decided.
        requests, rows: what was judged by.
        alpha_before, alpha_after, alpha_bare: mean over all rows under incumbent, candidate, bare draft.
        tau_before, tau_after, tau_bare: all tokens over all expected rounds.
        gain: in tokens per second over the incumbent (0.1 is 10 % more).
        gain_ci95: 95 % interval of the gain; None with fewer than five requests.
        domains: by name.
    """

    promote: bool
    reason: str
    requests: int
    rows: int
    alpha_before: float | None
    alpha_after: float | None
    alpha_bare: float | None
    tau_before: float | None
    tau_after: float | None
    tau_bare: float | None
    gain: float | None
    gain_ci95: tuple[float, float] | None
    domains: Mapping[str, DomainFigures]


def judge(
    requests: Sequence[ReplayedRequest],
    *,
    candidate_cost: RoundCost,
    incumbent_cost: RoundCost,
    bare_cost: RoundCost | None = None,
    seed: int = 0,
    num_resamples: int = 2000,
) -> Verdict:
    """Promote a candidate that is faster for certain, and worse for no domain.

    All of these must hold; the first that does not is the reason:
    1. at least five requests have rows, and every alpha is a number;
    2. no domain loses more than one point of alpha (`_loses`);
    3. the candidate gives at least the bare draft's tokens per second;
    4. the lower bound of its gain over the incumbent in tokens per second is above zero (`_interval`).

    Args:
        requests: held out; those without rows do not count.
        candidate_cost: of a round, in the form that would be deployed. Each draft is judged at the K that is
            fastest with it, where its costs are known by width, as a schedule would serve it.
        incumbent_cost: of a round as it is served now.
        bare_cost: of a round without an adapter; None where it costs what the incumbent's does.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Raises:
        ValueError: a cost is not positive, or a request's drafts have different numbers of rows.
    """
    costs = (candidate_cost, incumbent_cost, bare_cost or incumbent_cost)
    if not all(0 <= cost.draft_s < math.inf and 0 < cost.verify_s < math.inf for cost in costs):
        raise ValueError(f"a round costs nothing, or no number of seconds: {costs}")
    answered = [one for one in requests if max(len(alphas) for alphas in one.drafts) > 0]
    if not answered:
        return _nothing_to_judge()
    table = Table.of(answered, costs)
    domains = np.array([one.domain for one in answered], object)
    by_domain = {name: table.part(domains == name) for name in sorted(set(domains.tolist()))}
    interval = _interval(table, seed, num_resamples) if len(answered) >= MIN_REQUESTS else None
    refusal = next(_refusals(answered, table, by_domain, interval), None)
    return Verdict(
        promote=refusal is None,
        reason=f"{refusal or 'The draft got faster'}: {_summary(table, interval)}.",
        requests=len(answered),
        rows=table.num_rows,
        alpha_before=table.alpha(INCUMBENT),
        alpha_after=table.alpha(CANDIDATE),
        alpha_bare=table.alpha(BARE),
        tau_before=table.tau(INCUMBENT),
        tau_after=table.tau(CANDIDATE),
        tau_bare=table.tau(BARE),
        gain=table.gain_over(INCUMBENT),
        gain_ci95=interval,
        domains={name: _figures(part) for name, part in by_domain.items()},
    )


def _nothing_to_judge() -> Verdict:
    reason = f"No held-out request has an answer to replay; the gate needs {MIN_REQUESTS}."
    return Verdict(False, reason, 0, 0, None, None, None, None, None, None, None, None, {})


def _refusals(
    requests: Sequence[ReplayedRequest],
    table: Table,
    by_domain: Mapping[str, Table],
    interval: tuple[float, float] | None,
) -> Iterator[str]:
    """What speaks against promotion, in the order in which it is told."""
    for draft, name in ((CANDIDATE, "trained"), (INCUMBENT, "active"), (BARE, "bare")):
        if not all(np.isfinite(one.drafts[draft]).all() for one in requests):
            yield f"The {name} draft computes something that is no number"
    if interval is None:
        yield f"{len(requests)} held-out requests are too few to judge by, {MIN_REQUESTS} are needed"
        return
    for name, part in by_domain.items():
        if _loses(part):
            before, after = part.alpha(INCUMBENT), part.alpha(CANDIDATE)
            yield (
                f"Domain {name!r} loses {100 * _loss(part):.1f} points of alpha ({before:.3f} to {after:.3f} "
                f"on {part.num_rows} rows, at most {100 * MAX_DOMAIN_LOSS:.0f} may go)"
            )
    over_bare = table.gain_over(BARE)
    # Where no adapter is active the bare draft is the incumbent, and the interval below says it all.
    if over_bare < 0 and over_bare != table.gain_over(INCUMBENT):
        yield f"The bare draft gives {_percent(-over_bare)} more tokens per second"
    if interval[0] <= 0:
        yield "A gain is not certain"


def _loss(part: Table) -> float:
    """Points of alpha that the candidate loses, as a share: positive is worse."""
    sums = part.alpha_sums.sum(axis=0)
    return float(sums[INCUMBENT] - sums[CANDIDATE]) / part.num_rows


def _loses(part: Table) -> bool:
    """Whether a domain loses more than one point of alpha.

    Where the loss is known within half a point (its standard error, which takes 200 rows at the least), it
    counts as measured. In a smaller domain chance alone costs more than a point: a candidate that is as good
    as the incumbent but disagrees with it in one row of ten loses more than a point of 200 rows in a third of
    all cases, and a gate that refused it would refuse nearly everything once there are a few domains. There,
    the loss must exceed one point by its standard error.
    """
    loss, error = _loss(part), _loss_error(part)
    return loss > MAX_DOMAIN_LOSS + (error if error > SHARP_ERROR else 0.0)


def _loss_error(part: Table) -> float:
    """Standard error of the loss: the largest of three.

    Requests as clusters (rows of one request go together), which needs several requests; rows as if they
    were independent; and one row, because fewer cannot be seen to change where alpha is 0 or 1.
    """
    n, rows, loss = len(part.rows), part.num_rows, _loss(part)
    scatter = part.alpha_sums[:, INCUMBENT] - part.alpha_sums[:, CANDIDATE] - loss * part.rows
    clustered = math.sqrt(n / max(n - 1, 1) * float(np.square(scatter).sum())) / rows
    spread = max(float(part.square_losses.sum()) - rows * loss**2, 0.0)
    independent = math.sqrt(spread / max(rows - 1, 1) / rows)
    return max(clustered, independent, 1 / rows)


def _interval(table: Table, seed: int, num_resamples: int) -> tuple[float, float]:
    """95 % interval of the gain over the incumbent: paired bootstrap over requests.

    Of five requests, an interval that was not expanded would promote 8 to 10 % of candidates that are no
    better.
    """

    def gain(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds = table.seconds[drawn].sum(axis=1)
        return np.asarray(seconds[:, INCUMBENT] / seconds[:, CANDIDATE] - 1)

    return bootstrap_interval(len(table.rows), gain, seed=seed, num_resamples=num_resamples)


def _figures(part: Table) -> DomainFigures:
    return DomainFigures(
        requests=len(part.rows),
        rows=part.num_rows,
        alpha_before=part.alpha(INCUMBENT),
        alpha_after=part.alpha(CANDIDATE),
        tau_before=part.tau(INCUMBENT),
        tau_after=part.tau(CANDIDATE),
    )


def _summary(table: Table, interval: tuple[float, float] | None) -> str:
    change = f"tau {table.tau(INCUMBENT):.3f} to {table.tau(CANDIDATE):.3f}, "
    change += f"{_percent(table.gain_over(INCUMBENT), signed=True)} tokens per second"
    before, after = table.depths[INCUMBENT], table.depths[CANDIDATE]
    if before != after:
        change += f" (fastest with {before} drafts a round before, {after} after)"
    if interval is None:
        return change
    low, high = (_percent(bound, signed=True) for bound in interval)
    return f"{change} (95 % interval {low} to {high}) on {len(table.rows)} held-out requests"


def _percent(share: float, *, signed: bool = False) -> str:
    return f"{100 * share:{'+' if signed else ''}.1f} %"
