"""Everything that reproduces a training run, as it is stored with the run and read back by `--resume`.

Contract: a recipe names requests by id and holds the settings of the day it was made, so that a resumed run
ends as it would have ended. Must not know a backend or the store.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from draftloop.backends.vocabulary import CutVocabulary
from draftloop.config.schema import TrainingSettings
from draftloop.errors import StorageError
from draftloop.learning.batches import planned_steps
from draftloop.learning.replayed import TimedRound
from draftloop.speculation.costs import RoundCosts
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

WHOLE_HEAD = "full"
_LISTS = ("failures", "replay", "validation", "gate", "gate_domains")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run's inputs.

    Attributes:
        settings: `training.*`.
        gradient_checkpointing: `memory.gradient_checkpointing`.
        num_draft_tokens: K that the gate judges at.
        threshold: the acceptance rate that separated failures from replay.
        failures, replay, validation, gate: request ids.
        gate_domains: of the gate's requests, in their order.
        parent: the adapter it goes on from.
        timed_round: what a round with the incumbent took, None where no request with drafts was stored.
        by_width: what rounds were calibrated to cost, where a schedule chooses K; else None.
        vocabulary: what the draft's head was cut to (`CutVocabulary.to_plain`); `full` where it was whole,
            None where an older version made the run.
        facts: digests of the draft, versions, device: not read back.
    """

    settings: TrainingSettings
    gradient_checkpointing: bool
    num_draft_tokens: int
    threshold: float
    failures: tuple[int, ...]
    replay: tuple[int, ...]
    validation: tuple[int, ...]
    gate: tuple[int, ...]
    gate_domains: tuple[str, ...]
    parent: str | None
    timed_round: TimedRound | None
    facts: Mapping[str, Any]
    by_width: RoundCosts | None = None
    vocabulary: str | None = None

    @property
    def learnt(self) -> tuple[int, ...]:
        """The requests that it trains on."""
        return (*self.failures, *self.replay)

    @property
    def num_steps(self) -> int:
        """Of the optimizer, in the whole run."""
        return len(planned_steps(self.failures, self.replay, self.settings))

    @property
    def last_request(self) -> int:
        """The newest request that it knows."""
        return max((0, *self.failures, *self.replay, *self.validation, *self.gate))

    def cut(self, today: CutVocabulary | None) -> CutVocabulary | None:
        """What the gate cuts the draft's head to; `today` is for runs that do not tell."""
        if self.vocabulary is None:
            return today
        return None if self.vocabulary == WHOLE_HEAD else CutVocabulary.from_plain(self.vocabulary)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        plain = {"settings": self.settings.model_dump(mode="json"), "facts": dict(self.facts)}
        measured = {name: values[name] and asdict(values[name]) for name in ("timed_round", "by_width")}
        return {**values, **plain, **measured}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            StorageError: it was damaged, or written by a version that knew other settings.
        """
        try:
            ids = {name: tuple(values[name]) for name in _LISTS}
            settings = TrainingSettings.model_validate(values["settings"])
            timed = values["timed_round"] and TimedRound(**values["timed_round"])
            # A run of an older version has none.
            costs = values.get("by_width")
            found = {"settings": settings, "timed_round": timed, "by_width": costs and _costs_of(costs)}
            recipe = cls(**{**values, **ids, **found})
            recipe.cut(None)
            return recipe
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"the run's recipe cannot be read: {error}", remedy="Train without --resume."
            ) from error


def _costs_of(values: Mapping[str, Any]) -> RoundCosts:
    """What `asdict` made of them; an older version did not tell the sampling, and timed greedily."""
    points = tuple((width, seconds) for width, seconds in values["verify_s"])
    sampling = Sampling(**values.get("sampling", {}))
    return RoundCosts(**{**values, "verify_s": points, "sampling": sampling})
