"""What past answers taught those after them: when to draft how much, and what may be written again.

Contract: opens the stream of one answer. Where the same seed must give the same text again, nothing that
other answers taught takes part. Must not know requests or settings files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.speculation.schedule import Schedule
from draftloop.speculation.stream import Stream
from draftloop.speculation.suffix import SuffixIndex, SuffixText

if TYPE_CHECKING:
    from draftloop.speculation.schedule import Pace
    from draftloop.speculation.stream import Conversation, DecodeSettings


@dataclass(frozen=True, slots=True)
class Experience:
    """Grows with every answer.

    Attributes:
        schedule: chooses K round by round; None drafts as many in each round as the settings say.
        suffixes: what the target has written.
    """

    schedule: Schedule | None
    suffixes: SuffixIndex

    def open(
        self,
        conversation: Conversation,
        settings: DecodeSettings,
        *,
        num_suffix_tokens: int,
        repeatable: bool,
    ) -> Stream:
        """The stream of one answer.

        Args:
            conversation: its caches.
            settings: how it is decoded.
            num_suffix_tokens: the most that a suffix match proposes in a round; 0 looks for none.
            repeatable: the same seed shall give the same text again. Sampled tokens depend on where the
                rounds end, so matches are looked for in the text alone.
        """
        pace: Pace | None = None
        k, schedule = settings.num_draft_tokens, self.schedule
        if schedule is not None and conversation.draft_cache is not None and (k or num_suffix_tokens):
            pace = schedule.open(k, repeatable=repeatable)
        suffix = None
        if num_suffix_tokens:
            index = SuffixIndex(0) if repeatable else self.suffixes
            suffix = SuffixText(index, conversation.max_tokens, num_suffix_tokens)
        return Stream(conversation, settings, pace, suffix)

    def anew(self) -> Experience:
        """None yet, on the same machine and within the same bounds."""
        schedule = None if self.schedule is None else Schedule(self.schedule.costs.calibrated)
        return Experience(schedule, SuffixIndex(self.suffixes.max_answer_tokens))
