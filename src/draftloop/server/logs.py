"""What the log says of an error that nobody foresaw: where it came from, never its words.

Contract: a message may quote what somebody wrote, and no text of a prompt or an answer shall be in the log.
"""

from __future__ import annotations

import logging
import traceback


def where_raised(error: BaseException) -> str:
    """The error's kind and the lines that it went through; also those of the errors behind it."""
    cause = error.__cause__ or error.__context__
    behind = f"\nbehind it: {where_raised(cause)}" if cause is not None else ""
    lines = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{lines}".rstrip() + behind


class WithoutWords(logging.Filter):
    """Takes the words out of the tracebacks that another library logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record passes."""
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = (
                f"{record.getMessage().rstrip()}: {where_raised(record.exc_info[1])}",
                (),
            )
            record.exc_info = None
        return True
