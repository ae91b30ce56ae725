"""Proposals for a batch of sequences: one draft step after the other, each for all of them.

Contract: builds a lazy graph and brings nothing to the host, but where a processor has to be told each token.
Each sequence is drafted for by its own rules and uniforms, as if it were alone; one that wants no more
is computed along. Must not know networks.

Letters: n sequences, K draft tokens, V vocabulary, or the columns of a cut head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from draftloop.backends.base import NO_PROPOSAL, Proposal
from draftloop.backends.biases import draft_bias
from draftloop.backends.mlx.acceptance import Stages, bar, draw, warp
from draftloop.backends.mlx.parts import Part, alike, barred, in_batch_order, numbers, padded
from draftloop.backends.mlx.steps import ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.backends.base import ProposeJob
    from draftloop.backends.mlx.cache import MlxCache
    from draftloop.backends.mlx.head import CutHead
    from draftloop.backends.mlx.steps import Steps
    from draftloop.types import Rules

    Bias = NDArray[np.float32] | None

MOST_PADDED_TOKENS = 16
"""Who has more to read than this reads it alone: padding would make all the others read as much."""


@dataclass(frozen=True, slots=True)
class DraftKind:
    """Which operations a drafted token takes: those of the warping, barred tokens, something added."""

    stages: Stages
    masked: bool
    biased: bool


def propose(
    steps: Steps, cut: CutHead | None, vocab_size: int, batch: Sequence[ProposeJob]
) -> list[Proposal]:
    """Draft for each job: tokens [K] int32 and, unless greedy, q [K, V], both still lazy.

    Args:
        steps: of the draft.
        cut: its head, where that is cut.
        vocab_size: V of the draft.
        batch: at least one.
    """
    heads = [job.rules if cut is None else cut.vocabulary.rules(job.rules) for job in batch]
    width = vocab_size if cut is None else len(cut.vocabulary.ids)
    members = alike([_kind(rules, width) for rules in heads])
    groups = [
        _Group(kind, [batch[i] for i in indexes], [heads[i] for i in indexes], cut, width)
        for kind, indexes in members.items()
    ]
    drafting = _Drafting(steps, groups, cut, vocab_size)
    drafting.run()
    return in_batch_order(drafting.proposals(), [i for indexes in members.values() for i in indexes])


class _Group:
    """Jobs that are drafted for alike.

    Args:
        kind: theirs.
        jobs: n of them.
        rules: theirs, their masked ids being columns of the head.
        cut: the head, where it is cut.
        width: V.
    """

    def __init__(
        self,
        kind: DraftKind,
        jobs: Sequence[ProposeJob],
        rules: Sequence[Rules],
        cut: CutHead | None,
        width: int,
    ) -> None:
        self.jobs = jobs
        self._kind = kind
        self._decide = partial(_decide, kind, cut)
        self._numbers = numbers(rules)
        self._uniforms = padded([job.uniforms for job in jobs], max(job.num_draft_tokens for job in jobs))
        self._barred = barred(rules, width) if kind.masked else None
        self._masked_rows = np.array([one.masked_rows for one in rules], np.int32)
        self._width = width
        self._drawn: list[mx.array] = []
        self._rows: list[mx.array] = []

    def part(self, step: int, biases: Sequence[Bias]) -> Part:
        """What step `step` decides."""
        # Who wants fewer tokens than the others of the group draws with what is left of theirs, for nothing.
        inputs = [self._numbers, self._uniforms[:, min(step, self._uniforms.shape[1] - 1)]]
        if self._kind.biased:
            added = [np.zeros(self._width, np.float32) if bias is None else bias for bias in biases]
            inputs.append(mx.array(np.stack(added)))
        if self._barred is not None:
            inputs += [self._barred, mx.array(self._masked_rows - step)]
        return Part(self._kind, self._decide, inputs, len(self.jobs), rows=1)

    def take(self, outputs: Sequence[mx.array]) -> mx.array:
        """What a step has decided; the tokens [n]."""
        self._drawn.append(outputs[0])
        self._rows += outputs[1:]
        return outputs[0]

    def proposals(self, counts: Sequence[int]) -> list[Proposal]:
        """The first tokens that were drawn for each job, so many of them."""
        if not self._drawn:
            return [NO_PROPOSAL] * len(self.jobs)
        tokens = mx.stack(self._drawn, axis=1)
        q = mx.stack(self._rows, axis=1) if self._rows else None
        return [
            Proposal(tokens[i, :k], None if q is None else q[i, :k], k) if k else NO_PROPOSAL
            for i, k in enumerate(counts)
        ]


class _Drafting:
    """A batch of proposals in the making; everything is in the order of the groups."""

    def __init__(self, steps: Steps, groups: Sequence[_Group], cut: CutHead | None, vocab_size: int) -> None:
        self._steps = steps
        self._groups = groups
        self._vocab_size = vocab_size
        self._ids = None if cut is None else cut.vocabulary.ids
        self._jobs = [job for group in groups for job in group.jobs]
        self._caches = [cast("MlxCache", job.cache) for job in self._jobs]
        self._wanted = [job.num_draft_tokens for job in self._jobs]
        self._told: list[list[int]] = [[] for _ in self._jobs]

    def run(self) -> None:
        """Draft until nobody wants more."""
        tokens: mx.array | None = None
        unread: list[Sequence[int]] = []
        for step in range(max(self._wanted)):
            biases = self._biases(step, tokens)
            going = [step < wanted for wanted in self._wanted]
            if not any(going):
                break
            if tokens is None:
                unread = [self._caught_up(index, go) for index, go in enumerate(going)]
            widths = [len(part) for part in unread] if tokens is None else [int(go) for go in going]
            coming = _table(unread) if tokens is None else tokens[:, None]
            outputs = self._steps.draft(self._caches, coming, widths, self._parts(step, biases))
            drawn = [group.take(own) for group, own in zip(self._groups, outputs, strict=True)]
            tokens = drawn[0] if len(drawn) == 1 else mx.concatenate(drawn)
            # The device starts on this step while the host builds the next one, and then the verification.
            mx.async_eval(tokens)  # type: ignore[no-untyped-call]

    def proposals(self) -> list[Proposal]:
        """One for each job."""
        found, first = [], 0
        for group in self._groups:
            found += group.proposals(self._wanted[first : first + len(group.jobs)])
            first += len(group.jobs)
        return found

    def _parts(self, step: int, biases: Sequence[Bias]) -> list[Part]:
        parts, first = [], 0
        for group in self._groups:
            parts.append(group.part(step, biases[first : first + len(group.jobs)]))
            first += len(group.jobs)
        return parts

    def _biases(self, step: int, tokens: mx.array | None) -> list[Bias]:
        """What is added to each row; where nothing may be proposed any more, no more is wanted."""
        biases: list[Bias] = [None] * len(self._jobs)
        steered = [i for i, job in enumerate(self._jobs) if job.rules.processor and step < self._wanted[i]]
        if steered and tokens is not None:
            on_host = np.array(tokens)
            for index in steered:
                self._told[index].append(int(on_host[index]))
        for index in steered:
            bias = draft_bias(self._jobs[index].rules, self._told[index], self._vocab_size, self._ids)
            if bias is None:
                self._wanted[index] = step
            else:
                biases[index] = bias if self._ids is None else bias[self._ids]
        return biases

    def _caught_up(self, index: int, going: bool) -> Sequence[int]:
        """What a sequence reads in the first step."""
        unread = self._jobs[index].unread if going else ()
        if len(unread) <= MOST_PADDED_TOKENS or len(self._jobs) == 1:
            return unread
        self._steps.read(self._caches[index], ids(unread[:-1]))
        return unread[-1:]


def _kind(rules: Rules, width: int) -> DraftKind:
    masked = rules.masked_rows > 0 and any(token < width for token in rules.masked_ids)
    return DraftKind(Stages.of(rules.sampling), masked, rules.processor is not None)


def _table(rows: Sequence[Sequence[int]]) -> mx.array:
    """Tokens [n, T], padded on the right."""
    filled = np.zeros((len(rows), max(len(row) for row in rows)), np.int32)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return mx.array(filled)


def _decide(
    kind: DraftKind,
    cut: CutHead | None,
    logits: mx.array,
    numbers: mx.array,
    uniforms: mx.array,
    *rest: mx.array,
) -> list[mx.array]:
    """Logits [n, 1, V] → a token each, [n] int32, and its distributions [n, V] where they are no points."""
    scores = logits.astype(mx.float32)
    if kind.biased:
        scores, rest = scores + rest[0][:, None], rest[1:]
    if kind.masked:
        scores = bar(scores, *rest)
    if kind.stages.greedy:
        tokens, q = scores[:, 0].argmax(axis=-1), None
    else:
        q = warp(scores, kind.stages, numbers)[:, 0]
        tokens = draw(q, uniforms)
    if cut is not None:
        tokens, q = cut.token_ids(tokens), None if q is None else cut.spread(q, 0.0)
    return [tokens.astype(mx.int32), *([] if q is None else [q])]
