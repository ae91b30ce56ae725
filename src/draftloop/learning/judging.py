"""The gate's measurements: the form to deploy, what a round costs in it, and held-out requests replayed.

Contract: brings the candidate, the incumbent and the bare draft before `gate.judge` on the same requests,
through the backend's seam. Must not know the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.learning.forms import Outfit, choose_form
from draftloop.learning.gate import Verdict, judge
from draftloop.learning.replayed import ReplayedRequest
from draftloop.learning.yielding import UNHURRIED
from draftloop.speculation.metrics import expected_rounds, mean_alpha, tokens_per_round

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.backends.base import Model
    from draftloop.backends.lora import AdapterForm, Lora
    from draftloop.backends.training import Example
    from draftloop.learning.forms import FormFigures
    from draftloop.learning.replayed import RoundCost, TimedRound
    from draftloop.learning.yielding import Courtesy
    from draftloop.speculation.costs import RoundCosts

    Rows = NDArray[np.float32]

FORM_EXAMPLES = 16
"""At most so many requests compare the forms; the gate's own come after the choice."""
TOGETHER_TOKENS = 512
"""Of requests replayed together: whoever is answered meanwhile waits no longer than for a long one."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out request."""

    request: int
    domain: str
    example: Example


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """The gate's verdict and what it rests on.

    Attributes:
        verdict: promote or not, and why.
        form: that would be deployed.
        forms: every form's figures.
        candidate_cost, incumbent_cost: of a round.
        requests: one plain JSON object for each held-out request, for the report.
    """

    verdict: Verdict
    form: AdapterForm
    forms: Mapping[AdapterForm, FormFigures]
    candidate_cost: RoundCost
    incumbent_cost: RoundCost
    requests: tuple[Mapping[str, Any], ...]


def judge_candidate(
    draft: Model,
    lora: Lora,
    incumbent: Outfit,
    *,
    compared: Sequence[Example],
    held_out: Sequence[HeldOut],
    num_draft_tokens: int,
    timed_round: TimedRound | None,
    by_width: RoundCosts | None,
    seed: int,
    replayed: Callable[[float], None],
    courtesy: Courtesy = UNHURRIED,
) -> Judgement:
    """Choose the candidate's form, replay what was held out, and judge.

    Args:
        draft: loaded; what it wears afterwards is unspecified.
        lora: the candidate.
        incumbent: what is served now.
        compared: examples that the form is chosen by. It compares forms of one and the same candidate, so
            they may be examples that it was trained on.
        held_out: requests that the verdict is found by.
        num_draft_tokens: K, or the most that a schedule may choose.
        timed_round: what a round with the incumbent took; None where none was.
        by_width: the verification's cost by width, where a schedule chooses K; None where K is constant.
        seed: of the bootstrap.
        replayed: is called with the share of an example or held-out request that has been replayed.
        courtesy: times are measured while nobody else computes.
    """
    choice = choose_form(
        draft,
        lora,
        incumbent,
        compared,
        num_draft_tokens=num_draft_tokens,
        timed_round=timed_round,
        by_width=by_width,
        compared=replayed,
        courtesy=courtesy,
    )
    outfits = [Outfit(lora, choice.best), incumbent, *([] if incumbent.lora is None else [Outfit()])]
    alphas = _replay(draft, outfits, held_out, replayed)
    requests = [
        ReplayedRequest(one.domain, num_draft_tokens, candidate, before, *(bare or [before]))
        for one, candidate, before, *bare in zip(held_out, *alphas, strict=True)
    ]
    verdict = judge(
        requests,
        candidate_cost=choice.cost,
        incumbent_cost=choice.incumbent_cost,
        bare_cost=None if incumbent.lora is None else choice.bare_cost,
        seed=seed,
    )
    return Judgement(
        verdict=verdict,
        form=choice.best,
        forms=choice.figures,
        candidate_cost=choice.cost,
        incumbent_cost=choice.incumbent_cost,
        requests=tuple(map(_told, held_out, requests)),
    )


def _replay(
    draft: Model, outfits: Sequence[Outfit], held_out: Sequence[HeldOut], replayed: Callable[[float], None]
) -> list[list[Rows]]:
    """Alpha at each row of each held-out request, outfit by outfit."""
    alphas: list[list[Rows]] = []
    for outfit in outfits:
        draft.set_adapter(outfit.lora, outfit.form)
        rows: dict[int, Rows] = {}
        for pack in _packs(held_out):
            found = draft.replay([held_out[index].example for index in pack])
            rows.update(zip(pack, found, strict=True))
            replayed(len(pack) / len(outfits))
        alphas.append([rows[index] for index in range(len(held_out))])
    return alphas


def _packs(held_out: Sequence[HeldOut]) -> Iterator[list[int]]:
    """Requests to be replayed together. Those of a domain begin alike, which then is read once."""
    pack: list[int] = []
    tokens = 0
    for index in sorted(range(len(held_out)), key=lambda index: held_out[index].domain):
        length = len(held_out[index].example.tokens)
        if pack and tokens + length > TOGETHER_TOKENS:
            yield pack
            pack, tokens = [], 0
        pack.append(index)
        tokens += length
    if pack:
        yield pack


def _told(one: HeldOut, judged: ReplayedRequest) -> dict[str, Any]:
    """A held-out request as the report reads it."""
    return {
        "request": one.request,
        "domain": one.domain,
        "rows": one.example.num_rows,
        **_figures("before", judged.incumbent, judged.num_draft_tokens),
        **_figures("after", judged.candidate, judged.num_draft_tokens),
    }


def _figures(when: str, rows: Rows, num_draft_tokens: int) -> dict[str, float | None]:
    values = rows.tolist()
    return {
        f"alpha_{when}": mean_alpha(sum(values), len(values)),
        f"tau_{when}": tokens_per_round(len(values), expected_rounds(values, num_draft_tokens)),
    }
