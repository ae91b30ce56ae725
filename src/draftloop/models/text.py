"""Token ids in, text that may be shown out: whole characters only, and never half a stop string.

Contract: the pieces together equal `decode` of all tokens, cut before the first stop string. Only a
bounded tail is decoded again, so a token costs the same at the end of a long answer as at its start.
Must not know sampling, models or where the text is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from draftloop.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.models.tokenizer import Tokenizer


class TextStream:
    """The text of one answer as it grows.

    Text is decoded in runs: a run ends where the tokenizer says that no later token can change it
    (`Tokenizer.ends_midway`). Each run is decoded together with the one before it, because decoders
    treat the first token of a text in their own way (most drop its leading space).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Start an empty answer.

        Args:
            tokenizer: of the model that writes the answer.
            stop: strings that end it and are not shown. Of several, the one completed first counts; of
                those completed by one character, the longest.

        Raises:
            PromptError: a stop string is empty.
        """
        if "" in stop:
            raise PromptError("a stop string is empty", remedy="Give at least one character, or none at all.")
        self._tokenizer = tokenizer
        self._matchers = [_Matcher(s) for s in sorted(set(stop), key=len, reverse=True)]
        self._context: list[int] = []
        self._context_text = ""
        self._run: list[int] = []
        self._run_counts: list[int] = []
        self._held = ""
        self._pushed_tokens = 0
        self._stop: str | None = None
        self._tokens_used: int | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the answer, or None."""
        return self._stop

    @property
    def tokens_used(self) -> int:
        """How many pushed tokens belong to the answer, the one that completed the stop string included."""
        return self._pushed_tokens if self._tokens_used is None else self._tokens_used

    def push(self, token_ids: Sequence[int]) -> str:
        """Append tokens; returns the new text that may be shown, "" after a stop string."""
        shown = []
        for token_id in token_ids:
            if self._stop is not None:
                break
            self._pushed_tokens += 1
            if not self._tokenizer.has_text(token_id):
                continue
            self._run.append(token_id)
            self._run_counts.append(self._pushed_tokens)
            if not self._tokenizer.ends_midway(self._run):
                shown.append(self._take_run())
        return "".join(shown)

    def finish(self) -> str:
        """The rest, when no token will follow: what was held back for a stop string or a character."""
        shown = self._take_run() if self._run and self._stop is None else ""
        held, self._held = self._held, ""
        return shown + held

    def _take_run(self) -> str:
        text = self._run_text(len(self._run))
        shown = self._scan(text)
        self._context, self._run = self._run, []
        self._run_counts = []
        self._context_text = self._tokenizer.decode(self._context)
        return shown

    def _run_text(self, num_tokens: int) -> str:
        """Text that the first tokens of the run add to what came before."""
        text = self._tokenizer.decode(self._context + self._run[:num_tokens])
        return text[len(self._context_text) :]

    def _scan(self, text: str) -> str:
        """Add decoded text; returns what can no longer become a stop string."""
        held_chars = len(self._held)
        pending = self._held + text
        for index, character in enumerate(text):
            complete = [m for m in self._matchers if m.advance(character)]
            if complete:
                self._stop = complete[0].stop
                self._tokens_used = self._completed_by(text[: index + 1])
                self._held = ""
                return pending[: held_chars + index + 1 - len(self._stop)]
        keep = max((m.matched for m in self._matchers), default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def _completed_by(self, text: str) -> int:
        """How many tokens had been pushed when the run's text first began with `text`."""
        return next(
            pushed
            for num_tokens, pushed in enumerate(self._run_counts, start=1)
            if num_tokens == len(self._run) or self._run_text(num_tokens).startswith(text)
        )


class _Matcher:
    """Finds one stop string in text that comes character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallbacks = _fallbacks(stop)

    def advance(self, character: str) -> bool:
        """Read one character; True where it completes the stop string."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallbacks[self.matched - 1]
        if self.stop[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.stop)


def _fallbacks(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper border."""
    lengths = [0] * len(pattern)
    border = 0
    for index in range(1, len(pattern)):
        while border and pattern[index] != pattern[border]:
            border = lengths[border - 1]
        if pattern[index] == pattern[border]:
            border += 1
        lengths[index] = border
    return lengths
