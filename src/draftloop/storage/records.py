"""The rows of the store, as frozen data.

Contract: what is written and read back. Numbers are stored as they were measured; nothing here is computed
from another field. Must not know SQL.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.types import Sampling


@dataclass(frozen=True, slots=True)
class PairKey:
    """The names of the two models, as the settings have them. What one pair said teaches no other."""

    target: str
    draft: str


@dataclass(frozen=True, slots=True, eq=False)
class TraceRows:
    """Every emitted position of one answer; R rows. p is the target's at temperature 1, unmasked.

    Attributes:
        round_index: [R] int32, which round emitted it, from 0.
        kinds: [R] uint8: 0 accepted, 1 recovered, 2 bonus, 3 target, 4 suffix (`types.TokenKind`, in that
            order).
        draft_ids: [R] int32, what the draft model proposed there; -1 where it proposed nothing.
        draft_probs: [R] float32, q of that token after warping.
        top_ids: [R, 32] int32, most likely first.
        top_logprobs: [R, 32] float32; stored in 16 bits.
        tail_mass: [R] float32.
    """

    round_index: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    draft_ids: NDArray[np.int32]
    draft_probs: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    tail_mass: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class RequestRecord:
    """One request as it is stored.

    Attributes:
        created_s: Unix time of its end.
        pair: who answered.
        adapter: the draft's adapter ("a0003"); None is the bare draft.
        domain: what it is about: a tag, or the system prompt's hash.
        source: the command that made it: `generate`, `chat`, `collect`, `evaluate`.
        key: names a prompt of `collect`, so that it is not collected twice; None elsewhere.
        split_key: requests with one split key are on one side of the held-out split (a prompt asked
            twice, the turns of a conversation).
        prompt_tokens: [P] int32, chat template applied.
        answer_tokens: [R] int32, as emitted, EOS included.
        sampling: of p and q.
        min_tokens: the answer's shortest length; EOS is masked before it.
        num_draft_tokens: K, the cap; 0 asked the target alone.
        seed: of its uniforms.
        finish_reason: `stop`, `length`, or `cancelled` where the reader went away.
        rounds: verifications.
        drafted_tokens: proposed by the draft model.
        accepted_tokens: kept of those.
        tested_tokens: positions of its that have an alpha.
        alpha_sum: of those.
        prompt_s: seconds spent on the prompt.
        decode_s: seconds spent on the rounds.
        traces: R rows, one for each answer token.
        suffix_rounds: those of `rounds` in which a suffix match proposed, and not the draft model.
        suffix_tokens: emitted in them.
        suffix_drafted_tokens: proposed by the matches.
        suffix_accepted_tokens: kept of those.
        suffix_s: the part of decode_s that they took.
        vocabulary: names what the draft's head was cut to (`CutVocabulary.name`); None where it was whole.
    """

    created_s: float
    pair: PairKey
    adapter: str | None
    domain: str
    source: str
    key: str | None
    split_key: str
    prompt_tokens: NDArray[np.int32]
    answer_tokens: NDArray[np.int32]
    sampling: Sampling
    min_tokens: int
    num_draft_tokens: int
    seed: int
    finish_reason: str
    rounds: int
    drafted_tokens: int
    accepted_tokens: int
    tested_tokens: int
    alpha_sum: float
    prompt_s: float
    decode_s: float
    traces: TraceRows
    suffix_rounds: int = 0
    suffix_tokens: int = 0
    suffix_drafted_tokens: int = 0
    suffix_accepted_tokens: int = 0
    suffix_s: float = 0.0
    vocabulary: str | None = None


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """A stored request without its tokens and traces: cheap to list.

    Attributes:
        id: grows with time.
        held_out: it belongs to the gate's fifth and is never trained on.
        trained_by: the promoted adapter that learnt from it, None before.
        num_prompt_tokens, num_answer_tokens: lengths.
        stored_bytes: its share of the database.
        (the rest): as in `RequestRecord`.
    """

    id: int
    created_s: float
    adapter: str | None
    domain: str
    source: str
    held_out: bool
    trained_by: str | None
    num_prompt_tokens: int
    num_answer_tokens: int
    num_draft_tokens: int
    temperature: float
    rounds: int
    drafted_tokens: int
    accepted_tokens: int
    tested_tokens: int
    alpha_sum: float
    prompt_s: float
    decode_s: float
    stored_bytes: int
    suffix_rounds: int = 0
    suffix_tokens: int = 0
    suffix_drafted_tokens: int = 0
    suffix_accepted_tokens: int = 0
    suffix_s: float = 0.0
    vocabulary: str | None = None


class AdapterStatus(StrEnum):
    """What became of an adapter. Which one is active is told elsewhere: one for each pair."""

    PROMOTED = "promoted"
    REJECTED = "rejected"
    REVERTED = "reverted"
    IMPORTED = "imported"
    """Brought in from outside and not active since; nobody judged it."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter of the draft.

    Attributes:
        name: "a0001".
        pair: whom it serves.
        parent: the adapter that training went on from; None is the bare draft.
        created_s: Unix time.
        status: what the gate, or what came later, made of it.
        form: the deployed form (`backends.lora.AdapterForm`).
        run: id of the training run that made it; None where it was brought in from outside.
        reason: why it has this status, one sentence.
        metrics: the gate's figures, plain JSON.
    """

    name: str
    pair: PairKey
    parent: str | None
    created_s: float
    status: AdapterStatus
    form: str
    run: int | None
    reason: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Activation:
    """One change of a pair's active adapter.

    Attributes:
        generation: grows with every change of any pair.
        pair: whose.
        adapter: active from here on; None is the bare draft.
        created_s: Unix time.
        reason: one sentence.
        request_id: the newest request stored until then, of any pair; 0 where there was none.
    """

    generation: int
    pair: PairKey
    adapter: str | None
    created_s: float
    reason: str
    request_id: int


class RunStatus(StrEnum):
    """Where a training run stands. A run that is `running` while no process holds its lock was killed."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    PROMOTED = "promoted"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One training run.

    Attributes:
        id: grows with time.
        pair: whose draft learns.
        parent: the adapter it goes on from.
        started_s, ended_s: Unix times; ended_s is None while it runs.
        status: see `RunStatus`.
        recipe: everything that reproduces it: settings, seed, request ids in order, model digests, versions.
        result: the gate's figures and what was said; {} before the gate.
    """

    id: int
    pair: PairKey
    parent: str | None
    started_s: float
    ended_s: float | None
    status: RunStatus
    recipe: Mapping[str, Any]
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunPoint:
    """One point of a training curve.

    Attributes:
        step: optimizer step, from 1.
        epoch: how much of the data was seen, in passes.
        loss: of this step; None at a validation point.
        learning_rate: of this step.
        gradient_norm: before cutting; None where it was not finite (the step was skipped).
        validation_alpha: on the validating requests; None between validations.
    """

    step: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    gradient_norm: float | None
    validation_alpha: float | None


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyVersion:
    """What a draft's head was cut to, for one pair and one wish.

    Attributes:
        answer_tokens: of all answers that the pair had given when it was chosen.
        ids: [n] int32, the kept tokens, ascending; none where the head was left whole.
    """

    answer_tokens: int
    ids: NDArray[np.int32]
