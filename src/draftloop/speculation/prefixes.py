"""Past texts and what both models' caches held of them, for texts that begin alike.

Contract: what is kept are copies of exactly the tokens read, never a cache as allocated, and all of them
together stay below a bound; the least recently used go first. What a draft computed under another adapter is
not used. Nobody's answer fails for want of memory here: all that is kept is then given up. Must not know
requests or how a backend lays out its cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.errors import OutOfMemory
from draftloop.speculation.stream import common_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.speculation.stream import Conversation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """One text. The models' parts are of its first `target_tokens` and `draft_tokens`."""

    tokens: NDArray[np.int32]
    target: Any
    target_tokens: int
    draft: Any
    draft_tokens: int
    adapter: str | None
    num_bytes: int


class PrefixCache:
    """Keys and values of past texts, of both models.

    A text that a later one goes on from is dropped when that one is kept. A text too long for the bound is
    kept as far as it fits: its beginning is what others share.

    Args:
        max_bytes: of all of them together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: list[_Kept] = []
        """The least recently used first."""

    @property
    def num_bytes(self) -> int:
        """What is held."""
        return sum(kept.num_bytes for kept in self._kept)

    def resume(self, conversation: Conversation, prompt: Sequence[int]) -> None:
        """Let a conversation begin with what is kept of `prompt`, where that is more than it holds itself.

        Its caches are overwritten by copies; `read_prompt` reads the rest.
        """
        # The last token is read by the first round.
        wanted = np.asarray(prompt[:-1], np.int32)
        own = min(common_prefix(conversation.tokens, wanted), conversation.target_cache.position)
        shared = [min(common_prefix(kept.tokens, wanted), kept.target_tokens) for kept in self._kept]
        longest = max(shared, default=0)
        if longest <= own:
            return
        # Of several the newest: it is the likeliest to be wanted again.
        index = len(shared) - 1 - shared[::-1].index(longest)
        kept = self._kept.pop(index)
        self._kept.append(kept)
        try:
            _paste(kept, longest, conversation)
        except OutOfMemory as error:
            # A cache may have been overwritten by half: the prompt is read from its beginning.
            conversation.settle(0)
            self.give_up(error)
            return
        conversation.tokens = list(prompt)

    def keep(self, conversation: Conversation) -> None:
        """Copy what a conversation's caches hold. It may go on afterwards, or be dropped."""
        target, draft = conversation.target_cache, conversation.draft_cache
        if not target.position:
            return
        token_bytes = target.bytes_per_token + (draft.bytes_per_token if draft else 0)
        room = self.max_bytes // token_bytes
        target_tokens = min(target.position, room)
        draft_tokens = min(draft.position, target_tokens) if draft else 0
        tokens = np.asarray(conversation.tokens[:target_tokens], np.int32)
        if not target_tokens or self._covered(tokens, draft_tokens, conversation.adapter):
            return
        num_bytes = target_tokens * target.bytes_per_token
        num_bytes += draft_tokens * draft.bytes_per_token if draft else 0
        self._kept = [kept for kept in self._kept if common_prefix(kept.tokens, tokens) < len(kept.tokens)]
        while self.num_bytes + num_bytes > self.max_bytes:
            del self._kept[0]
        try:
            target_copy = target.copy(target_tokens)
            draft_copy = draft.copy(draft_tokens) if draft and draft_tokens else None
        except OutOfMemory as error:
            self.give_up(error)
            return
        self._kept.append(
            _Kept(
                tokens=tokens,
                target=target_copy,
                target_tokens=target_tokens,
                draft=draft_copy,
                draft_tokens=draft_tokens,
                adapter=conversation.adapter,
                num_bytes=num_bytes,
            )
        )

    def give_up(self, error: OutOfMemory) -> bool:
        """Answers need the memory more; whether anything was kept."""
        if not self._kept:
            return False
        logger.warning("%s; what was kept of %d past texts is dropped", error.what, len(self._kept))
        self._kept.clear()
        return True

    def _covered(self, tokens: NDArray[np.int32], draft_tokens: int, adapter: str | None) -> bool:
        """Whether a kept text says as much already; it is then the most recently used one."""
        for index, kept in enumerate(self._kept):
            enough = kept.adapter == adapter and kept.draft_tokens >= draft_tokens
            if enough and common_prefix(kept.tokens, tokens) == len(tokens):
                self._kept.append(self._kept.pop(index))
                return True
        return False


def _paste(kept: _Kept, num_tokens: int, conversation: Conversation) -> None:
    """Overwrite a conversation's caches by the first `num_tokens` of what is kept."""
    conversation.target_cache.paste(kept.target, num_tokens)
    if conversation.draft_cache is None:
        return
    known = min(kept.draft_tokens, num_tokens) if kept.adapter == conversation.adapter else 0
    if known:
        conversation.draft_cache.paste(kept.draft, known)
    else:
        conversation.forget_draft(conversation.adapter)
