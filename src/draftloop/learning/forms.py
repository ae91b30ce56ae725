"""Which form an adapter is deployed in: the one with the most tokens a second, as measured here.

Contract: times and replays the draft through the backend's seam; decides nothing about promotion. Must
not know requests or the store.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import ProposeJob
from draftloop.backends.lora import AdapterForm
from draftloop.speculation.metrics import expected_rounds, tokens_per_round
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draftloop.backends.base import Model
    from draftloop.backends.lora import Lora
    from draftloop.backends.training import Example

TIMED_PROPOSALS = 5
INTERLEAVED_PASSES = 2
VERIFY_DRAFTS = 3
"""Where no round was ever timed, a verification counts as so many drafted tokens."""
CONTEXT_TOKENS = 64
"""The draft drafts behind a short text: what a form costs does not depend on it."""


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a draft wears; no LoRA is the bare draft."""

    lora: Lora | None = None
    form: AdapterForm = AdapterForm.UNFUSED


@dataclass(frozen=True, slots=True)
class FormFigures:
    """What one form was measured to do.

    Attributes:
        draft_s: seconds a drafted token.
        tau: of the examples, replayed in this form.
        tokens_per_s: expected, tau over the round's cost.
    """

    draft_s: float
    tau: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class FormChoice:
    """Every form's figures, and the rounds' costs beside them.

    Attributes:
        figures: of each form that the backend has.
        incumbent_draft_s: seconds a drafted token with the incumbent.
        bare_draft_s: the same without an adapter.
        verify_s: seconds of a round beside its drafts.
    """

    figures: Mapping[AdapterForm, FormFigures]
    incumbent_draft_s: float
    bare_draft_s: float
    verify_s: float

    @property
    def best(self) -> AdapterForm:
        """The plainer one of equals."""
        return max(self.figures, key=lambda form: self.figures[form].tokens_per_s)


def choose_form(
    draft: Model,
    lora: Lora,
    incumbent: Outfit,
    examples: Sequence[Example],
    *,
    num_draft_tokens: int,
    round_s: float | None,
) -> FormChoice:
    """Measure every form that the backend has, in turn with the incumbent and the bare draft.

    Args:
        draft: wears the last outfit measured afterwards.
        lora: the candidate.
        incumbent: what is served now.
        examples: replayed in each form.
        num_draft_tokens: K.
        round_s: what a round costs with the incumbent; its verification is what the drafts leave of it.
            None where no round was ever timed.
    """
    outfits = [Outfit(), incumbent, *(Outfit(lora, form) for form in draft.adapter_forms)]
    bare_s, incumbent_s, *seconds = interleaved_draft_seconds(draft, outfits, num_draft_tokens)
    verify_s = _verify_seconds(round_s, incumbent_s, num_draft_tokens)
    figures = {}
    for outfit, draft_s in zip(outfits[2:], seconds, strict=True):
        draft.set_adapter(outfit.lora, outfit.form)
        tau = replayed_tau(draft, examples, num_draft_tokens)
        figures[outfit.form] = FormFigures(draft_s, tau, tau / (num_draft_tokens * draft_s + verify_s))
    return FormChoice(figures, incumbent_s, bare_s, verify_s)


def _verify_seconds(round_s: float | None, draft_s: float, num_draft_tokens: int) -> float:
    """A round's cost without its drafts; never less than one drafted token's, since the target is larger."""
    if round_s is None:
        return VERIFY_DRAFTS * draft_s
    return max(round_s - num_draft_tokens * draft_s, draft_s)


def interleaved_draft_seconds(draft: Model, outfits: Sequence[Outfit], num_draft_tokens: int) -> list[float]:
    """Seconds a drafted token in each outfit: medians over passes in turn, so that a busy moment hits all."""
    passes: list[list[float]] = [[] for _ in outfits]
    for _ in range(INTERLEAVED_PASSES):
        for seconds, outfit in zip(passes, outfits, strict=True):
            draft.set_adapter(outfit.lora, outfit.form)
            seconds.extend(_proposal_seconds(draft, num_draft_tokens))
    return [statistics.median(seconds) / num_draft_tokens for seconds in passes]


def replayed_tau(draft: Model, examples: Sequence[Example], num_draft_tokens: int) -> float:
    """Tokens a round over all examples, as the draft is now; 1 where there are none."""
    alphas = draft.replay(examples)
    rounds = sum(expected_rounds(rows.tolist(), num_draft_tokens) for rows in alphas)
    return tokens_per_round(sum(len(rows) for rows in alphas), rounds) or 1.0


def _proposal_seconds(draft: Model, num_draft_tokens: int) -> list[float]:
    """Wall time of proposing K tokens behind a short text, several times."""
    cache = draft.new_cache()
    context = max(1, min(CONTEXT_TOKENS, cache.max_tokens - num_draft_tokens))
    rules, uniforms = Rules(Sampling()), np.zeros(num_draft_tokens, np.float32)
    seconds = []
    for turn in range(TIMED_PROPOSALS + 1):
        unread = [1] if turn else [1] * context
        started_s = time.perf_counter()
        proposal = draft.propose([ProposeJob(cache, unread, num_draft_tokens, rules, uniforms)])[0]
        # A device works ahead of the host; reading a token waits for it.
        int(proposal.tokens[-1])
        seconds.append(time.perf_counter() - started_s)
        cache.trim(num_draft_tokens)
    return seconds[1:]
