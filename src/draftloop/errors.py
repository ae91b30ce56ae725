"""Every error a user can meet, in one tree.

Contract: an error says what failed (with the value seen) and the remedy. The command line prints
`str(error)` and leaves with `exit_status`; it never shows a traceback for these.
"""

from __future__ import annotations


class DraftloopError(Exception):
    """The work failed.

    Args:
        what: what failed and the value seen, without a final full stop.
        remedy: what the user can do about it, a whole sentence.
    """

    exit_status = 1

    def __init__(self, what: str, *, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


class InputError(DraftloopError):
    """The user's input is wrong: a flag, a prompt, a file."""

    exit_status = 2


class ConfigError(InputError):
    """A setting is unknown, of the wrong type, out of range, or cannot act here."""


class PromptError(InputError):
    """A prompt or a prompts file cannot be used."""


class ContextFull(PromptError):
    """A prompt leaves no room for an answer in the KV cache."""


class ModelNotFound(InputError):
    """A model's name resolves to nothing."""


class ModelUnreadable(InputError):
    """A model's files are there but damaged, incomplete, or of a kind that no backend reads."""


class TokenizerMismatch(InputError):
    """Target and draft do not share one vocabulary."""


class BackendUnavailable(InputError):
    """The backend asked for is not installed or cannot run on this machine."""


class MemoryPlanError(InputError):
    """The plan does not fit into this machine's memory.

    Args:
        what: as for every error.
        remedy: as for every error.
        details: the plan, a line for each part, to be shown below the error; "" where there is none.
    """

    def __init__(self, what: str, *, remedy: str, details: str = "") -> None:
        super().__init__(what, remedy=remedy)
        self.details = details


class DownloadError(DraftloopError):
    """A download was interrupted or refused; the next try goes on."""


class StorageError(DraftloopError):
    """A file could not be written: a full disk, a folder without permission."""


class RecordLost(StorageError):
    """One stored record is damaged or was evicted; the others can be read."""


class GrammarFailed(DraftloopError):
    """An answer's grammar cannot be followed any further."""


class OutOfMemory(DraftloopError):
    """Memory ran out in spite of the plan."""
