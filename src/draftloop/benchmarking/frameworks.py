"""mlx-lm and transformers as peers: generation of two frameworks on the folders that ours reads too.

Contract: runs in a child; token ids in. The frameworks are imported where their backends are. Must not know
other peers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from draftloop.backends.registry import let_waiting_threads_sleep
from draftloop.benchmarking.contenders import Answer, answer_from_bursts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.benchmarking.child import PeerSetup
    from draftloop.benchmarking.contenders import Job
    from draftloop.types import Sampling


class Generation(Protocol):
    """A framework's own generation."""

    def bursts(
        self, prompt_tokens: Sequence[int], max_tokens: int, sampling: Sampling, seed: int
    ) -> list[tuple[float, int]]:
        """When each round was over, in seconds, and how many tokens it gave."""
        ...


@dataclass(frozen=True, slots=True)
class Framework:
    """See `Program`."""

    description: str
    generation: Generation

    def answer(self, job: Job) -> Answer:
        """Decode one answer."""
        return answer_from_bursts(
            self.generation.bursts(job.prompt_tokens, job.max_tokens, job.sampling, job.seed)
        )


def open_mlx_lm(setup: PeerSetup) -> Framework:
    """Load it, in the child."""
    from draftloop.backends.mlx.peer import MlxLm

    generation = MlxLm(setup.target, setup.draft, setup.num_draft_tokens, setup.eos_token_ids)
    drafting = f"{setup.num_draft_tokens} draft tokens" if setup.draft else "the target alone"
    return Framework(f"mlx-lm {version('mlx-lm')} on {generation.device}, {drafting}", generation)


def open_transformers(setup: PeerSetup) -> Framework:
    """Load it, in the child."""
    let_waiting_threads_sleep()
    from draftloop.backends.torch.peer import AssistedGeneration

    generation = AssistedGeneration(
        setup.target,
        setup.draft,
        num_draft_tokens=setup.num_draft_tokens,
        eos_token_ids=setup.eos_token_ids,
        threads=setup.threads,
        device=setup.device,
    )
    drafting = f"assisted, {setup.num_draft_tokens} draft tokens" if setup.draft else "the target alone"
    name = f"transformers {version('transformers')}, torch {version('torch')} on {generation.device}"
    return Framework(f"{name}, {setup.threads} threads, bfloat16, {drafting}", generation)
