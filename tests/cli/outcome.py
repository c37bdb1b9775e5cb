"""What one run of the command line gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Exit status, standard output, standard error."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, all of it, as JSON."""
        return json.loads(self.out)

    @property
    def mistake(self) -> str:
        """The one line about a user's mistake."""
        assert self.status == 2
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1
        assert self.out == ""
        return lines[0].removeprefix("lowbit: ")


Lowbit = Callable[..., Outcome]
