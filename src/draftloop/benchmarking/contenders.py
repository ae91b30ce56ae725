"""One prompt in, what it took out: what every mode of a benchmark does, ours and the peers'.

Contract: a contender reads a prompt and decodes its answer; the time that the prompt took counts for nobody.
Must not know other contenders, nor how figures are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from draftloop.engine import Request
from draftloop.speculation.metrics import tokens_per_second

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.engine import Engine
    from draftloop.speculation.experience import Experience
    from draftloop.types import Sampling


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, the same for everybody.

    Attributes:
        prompt_tokens: chat template applied.
        max_tokens: of the answer, EOS included; EOS ends it sooner.
        sampling: temperature, top-p, top-k, min-p.
        seed: where a mode draws at random.
        warm_up: nothing is to be learnt from the answer.
    """

    prompt_tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    seed: int
    warm_up: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What decoding took.

    Attributes:
        tokens: that were decoded within `seconds`. A program that counts time from its first token or first
            round on leaves those out of both.
        seconds: of decoding.
        rounds: that gave `tokens`; None where the program does not tell.
        alpha_sum, tested_tokens: Σ alpha over the tested positions, and their number; 0 where unknown.
    """

    tokens: int
    seconds: float
    rounds: int | None = None
    alpha_sum: float = 0.0
    tested_tokens: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed; None where the answer was too short to have one."""
        return tokens_per_second(self.tokens, self.seconds) if self.tokens else None


class Contender(Protocol):
    """One mode of the benchmark."""

    @property
    def name(self) -> str:
        """As in `--modes`."""
        ...

    @property
    def description(self) -> str:
        """What it is: program, version, threads, number of draft tokens."""
        ...

    def answer(self, job: Job) -> Answer:
        """Decode one answer."""
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """This program, with so many draft tokens a round, by the model and by suffix matches; 0 and 0 is the
    target alone. What a mode learns from its answers stays its own: at the next prompt, no other mode's
    answer to the same one helps it.
    """

    name: str
    description: str
    engine: Engine
    experience: Experience
    num_draft_tokens: int
    num_suffix_tokens: int = 0

    def answer(self, job: Job) -> Answer:
        """See `Contender`. The first round reads the prompt's last token, as every round reads one.

        Drafts are chosen as in serving, by what past answers taught too.
        """
        experience = self.engine.experience.anew() if job.warm_up else self.experience
        completion = self.engine.complete(
            Request(
                prompt_tokens=job.prompt_tokens,
                sampling=job.sampling,
                max_tokens=job.max_tokens,
                num_draft_tokens=self.num_draft_tokens,
                num_suffix_tokens=self.num_suffix_tokens,
                seed=job.seed,
                repeatable=False,
            ),
            experience=experience,
        )
        tally = completion.tally
        return Answer(
            tokens=tally.completion_tokens,
            seconds=completion.decode_s,
            rounds=tally.rounds,
            alpha_sum=tally.alpha_sum,
            tested_tokens=tally.tested_tokens,
        )


def answer_from_bursts(bursts: Sequence[tuple[float, int]]) -> Answer:
    """An answer from what each round gave and when: (seconds, tokens), in order.

    The first round stands behind the reading of the prompt, in one piece with it, so that neither its time
    nor its tokens count.
    """
    if len(bursts) < 2:
        return Answer(tokens=0, seconds=0.0)
    return Answer(
        tokens=sum(tokens for _, tokens in bursts[1:]),
        seconds=bursts[-1][0] - bursts[0][0],
        rounds=len(bursts) - 1,
    )
