"""The halves of a round as CUDA graphs: drafted tokens, a graph a step, and a verification with its decision.

Contract: sequences that are treated alike share each graph, its decision and the one transfer to the host
(`told`); nothing else waits for the device. The results are those of `TorchModel`'s plain loop, or None where
a text needs that. Must not know how a step goes.

Letters: R rows, S sequences, both as recorded; K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from draftloop.backends.base import Proposal
from draftloop.backends.torch.acceptance import NO_GUESS, drawn, outcome, to_device, told
from draftloop.backends.torch.cuda.graphs import Part
from draftloop.backends.torch.cuda.shapes import Reading
from draftloop.backends.torch.drafting import own_cache

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from draftloop.backends.base import ProposeJob, VerifyJob
    from draftloop.backends.torch.cuda.graphs import GraphedSteps
    from draftloop.backends.torch.cuda.shapes import Shape
    from draftloop.backends.torch.cuda.step import Step
    from draftloop.types import Rules, Sampling, Verdict

_FEWEST_PLACES = 8
"""Drafted tokens that there is room for from the start; a longer draft makes room, and new graphs."""

Tensors = tuple[torch.Tensor, ...]


class _Room:
    """Where the drafts of S sequences are put: places [P, S], and the place that comes next."""

    def __init__(self, places: int, sequences: int, vocab_size: int | None, device: torch.device) -> None:
        self.tokens = torch.zeros(places, sequences, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(places, sequences, device=device)
        self.next = torch.zeros(1, dtype=torch.long, device=device)
        self.q: torch.Tensor | None = None
        if vocab_size is not None:
            self.q = torch.zeros(places, sequences, vocab_size, device=device)

    def draw(self, logits: torch.Tensor, sampling: Sampling, masks: Tensors) -> torch.Tensor:
        """Launch: the next tokens [S] out of logits [S, V] go to their place.

        masks: none, or in how many of the coming rows each sequence lacks the columns of the second.
        """
        if masks:
            rows, columns = masks
            logits = _hidden(logits, self.next < rows, columns)
        tokens, q = drawn(logits, sampling, self.uniforms.index_select(0, self.next)[0])
        self.tokens.index_copy_(0, self.next, tokens[None])
        if q is not None and self.q is not None:
            self.q.index_copy_(0, self.next, q[None])
        self.next.add_(1)
        return tokens


class RecordedDrafts:
    """One model's drafts: a graph of the first step for each shape of what is unread, and one of all others.

    So there are few to record, whatever K. Where a step's tokens go, the device itself counts. A sequence
    that wants fewer tokens than another rides along and writes nothing.

    Args:
        steps: of the model.
        vocab_size: columns of its logits.
        device: where it is.
    """

    def __init__(self, steps: GraphedSteps, vocab_size: int, device: torch.device) -> None:
        self._steps = steps
        self._vocab_size = vocab_size
        self._device = device
        self._rooms: dict[tuple[int, bool], _Room] = {}

    def drafted(self, batch: Sequence[ProposeJob]) -> list[Proposal] | None:
        """Read what is unread, and draft each job's K tokens; None: nothing was read.

        batch: alike in what `alike` says, with no processor.
        """
        wanted, rules = [job.num_draft_tokens for job in batch], [job.rules for job in batch]
        readings = [Reading(own_cache(job.cache), len(job.unread), job.num_draft_tokens - 1) for job in batch]
        shape = self._steps.shape_for(readings)
        if shape is None:
            return None
        sampling, most = rules[0].sampling, max(wanted)
        room = self._room(most, shape.sequences, sampling)
        uniforms = np.zeros((most, shape.sequences), np.float32)
        for i, job in enumerate(batch):
            uniforms[: wanted[i], i] = job.uniforms
        room.uniforms[:most].copy_(to_device(uniforms, self._device))
        # Recording takes steps too; they must find a place.
        room.next.zero_()
        masks = _masks(
            [one.masked_rows for one in rules],
            rules[0].masked_ids,
            shape.sequences,
            self._vocab_size,
            self._device,
        )
        parts = [
            self._first(room, shape, sampling, masks),
            *[self._following(room, shape, sampling, masks)] * (most - 1),
        ]
        unread = [token for job in batch for token in job.unread]
        ids = _sent(unread, self._device)
        if self._steps.run(parts, readings, ids, inputs=masks) is None:
            return None
        # The next draft writes over these. Each sequence's stand together, for what reads them.
        tokens = room.tokens[:most].t().clone(memory_format=torch.contiguous_format)
        q = room.q
        if q is not None:
            q = q[:most].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        return [Proposal(tokens[i, :k], None if q is None else q[i, :k], k) for i, k in enumerate(wanted)]

    def _first(self, room: _Room, shape: Shape, sampling: Sampling, masks: Tensors) -> Part:
        def body(step: Step, masks: Tensors) -> Tensors:
            room.next.zero_()
            logits = step.logits(shape)
            if shape.rows > 1:
                logits = logits.index_select(0, step.last_rows[: shape.sequences])
            step.tokens[: shape.sequences].copy_(room.draw(logits, sampling, masks))
            return ()

        return Part(("first", shape, *_key(room, sampling, masks)), body)

    def _following(self, room: _Room, shape: Shape, sampling: Sampling, masks: Tensors) -> Part:
        def body(step: Step, masks: Tensors) -> Tensors:
            logits = step.next_logits(shape)
            step.tokens[: shape.sequences].copy_(room.draw(logits, sampling, masks))
            return ()

        return Part(("following", shape.sequences, *_key(room, sampling, masks)), body)

    def _room(self, places: int, sequences: int, sampling: Sampling) -> _Room:
        room = self._rooms.get((sequences, sampling.greedy))
        if room is None or len(room.tokens) < places:
            width = None if sampling.greedy else self._vocab_size
            room = _Room(max(places, _FEWEST_PLACES), sequences, width, self._device)
            self._rooms[sequences, sampling.greedy] = room
        return room


def alike(rules: Rules) -> Hashable:
    """What sequences of one graph must share; None where rows are changed by what no recording knows."""
    return None if rules.processor is not None else (rules.sampling, rules.masked_ids)


def verified(steps: GraphedSteps, batch: Sequence[VerifyJob], vocab_size: int) -> list[Verdict] | None:
    """Read each job's last token and its guesses, and decide; None: nothing was read.

    batch: alike in what `alike` says and in whether they want a trace, with no processor.
    """
    readings = [Reading(own_cache(job.cache), job.proposal.num_tokens + 1) for job in batch]
    shape = steps.shape_for(readings)
    if shape is None:
        return None
    device = readings[0].cache.values.device
    rules, trace = batch[0].rules, batch[0].trace
    sampling, sequences = rules.sampling, shape.sequences
    tokens, guesses = _packed_tokens(batch, shape.rows, device)
    q = _packed_q(batch, guesses, vocab_size)
    masked = [max(0, job.rules.masked_rows - i) for job in batch for i in range(job.proposal.num_tokens + 1)]
    masks = _masks(masked, rules.masked_ids, shape.rows, vocab_size, device)

    def body(step: Step, inputs: Tensors) -> Tensors:
        logits = step.logits(shape)
        guesses, uniforms, *rest = inputs
        hidden = _hidden(logits, rest[0] > 0, rest[1]) if masks else logits
        return (
            outcome(
                logits,
                hidden,
                guesses,
                None if q is None else rest[-1],
                step.first_rows[:sequences],
                uniforms=(uniforms[0], uniforms[1]),
                sampling=sampling,
                trace=trace,
            ),
        )

    inputs = (guesses, _packed_uniforms(batch, shape.rows, device), *masks, *(() if q is None else (q,)))
    width = None if q is None else q.shape[1]
    part = Part(("verify", shape, sampling, trace, width, len(masks) and len(masks[1])), body)
    found = steps.run((part,), readings, tokens, inputs=inputs)
    return None if found is None else told(found[0], batch, sequences=sequences)


def _key(room: _Room, sampling: Sampling, masks: Tensors) -> tuple[Hashable, ...]:
    return sampling, len(room.tokens), len(masks) and len(masks[1])


def _masks(
    rows: Sequence[int], ids: Sequence[int], count: int, vocab_size: int, device: torch.device
) -> Tensors:
    """`rows`, zeros up to `count`, and the columns that are masked where they are positive; () for none."""
    ids = [token for token in ids if token < vocab_size]
    if not ids or not any(rows):
        return ()
    sent = _sent([*rows, *[0] * (count - len(rows)), *ids], device)
    return sent[:count], sent[count:]


def _hidden(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[R, V] logits with the columns at -inf in the rows [R] that say so."""
    values = logits.index_select(1, columns).masked_fill(rows.unsqueeze(1), -torch.inf)
    return logits.index_copy(1, columns, values)


def _packed_tokens(
    batch: Sequence[VerifyJob], rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read, [T], and what is guessed behind each of `rows` rows, `NO_GUESS` where nothing is.

    Tokens of a draft model stay on the device: all that is sent there is one array.
    """
    drafted = [job.proposal.tokens for job in batch if isinstance(job.proposal.tokens, torch.Tensor)]
    known, passed = [NO_GUESS], 0
    num_drafted = sum(len(tokens) for tokens in drafted)
    read: list[int] = []
    guessed: list[int] = []
    for job in batch:
        k = job.proposal.num_tokens
        read.append(num_drafted + len(known))
        known.append(job.last)
        if isinstance(job.proposal.tokens, torch.Tensor):
            places = range(passed, passed + k)
            passed += k
        else:
            places = range(num_drafted + len(known), num_drafted + len(known) + k)
            known += job.proposal.tokens
        read += places
        guessed += [*places, num_drafted]
    guessed += [num_drafted] * (rows - len(guessed))
    sent = _sent([*known, *read, *guessed], device)
    pool = torch.cat([*drafted, sent[: len(known)]])
    tokens = pool.index_select(0, sent[len(known) :])
    return tokens[: len(read)], tokens[len(read) :]


def _packed_q(batch: Sequence[VerifyJob], guesses: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """[R, at least V] where a sequence has one; a point mass is 1 at its guess. None where all are points."""
    widths = [job.proposal.q.shape[1] for job in batch if job.proposal.q is not None]
    if not widths:
        return None
    width = max(vocab_size, *widths)
    q = torch.zeros(len(guesses), width, device=guesses.device)
    first = 0
    points: list[int] = []
    for job in batch:
        k, own = job.proposal.num_tokens, job.proposal.q
        if own is None:
            points += range(first, first + k)
        else:
            q[first : first + k, : own.shape[1]] = own
        first += k + 1
    if points:
        rows = _sent(points, guesses.device)
        columns = guesses.index_select(0, rows)
        known = columns.clamp(max=width - 1)
        q[rows, known] = (columns == known).float()
    return q


def _packed_uniforms(batch: Sequence[VerifyJob], rows: int, device: torch.device) -> torch.Tensor:
    """[2, R]: whether guesses are kept, and what the extra token is drawn by."""
    numbers, first = np.zeros((2, rows), np.float32), 0
    for job in batch:
        k = job.proposal.num_tokens
        numbers[0, first : first + k] = job.accept_uniforms
        numbers[1, first : first + k + 1] = job.extra_uniforms
        first += k + 1
    return to_device(numbers, device)


def _sent(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)
