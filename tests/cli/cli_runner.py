"""What a command left behind, and the checks that every test of the command line shares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left behind."""

    exit_status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which must be one JSON value and nothing else."""
        assert self.exit_status == 0, self.err
        return json.loads(self.out)

    def assert_done(self) -> None:
        """Exit status 0."""
        assert self.exit_status == 0, self.err

    def assert_wrong_input(self, *words: str) -> None:
        """Exit status 2, nothing on stdout, one line on stderr that holds all `words`."""
        self.assert_fails(2, *words)

    def assert_fails(self, exit_status: int, *words: str) -> None:
        """That exit status, nothing on stdout, one line on stderr that holds all `words`."""
        assert self.exit_status == exit_status, self.err
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.endswith(("\n",))
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in {self.err!r}"


def settings(**values: object) -> list[str]:
    """`--set key=value` for each."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
