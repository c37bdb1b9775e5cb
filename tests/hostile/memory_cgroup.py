"""A cgroup that limits memory, of either version, where the system lets one be made."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_NUMBERS = itertools.count()


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A folder whose ``cgroup.procs`` takes processes that together may hold `limit` bytes, swap included.

    Pages of mapped files count, but are dropped where memory runs short; what a process had before it came in doesn't.

    Raises:
        OSError: there are no cgroups, or none may be made.
    """
    first = (_ROOT / "memory").is_dir()
    folder = (_ROOT / "memory" if first else _ROOT) / f"lowbit-{os.getpid()}-{next(_NUMBERS)}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        with contextlib.suppress(OSError):  # swap isn't counted everywhere
            name, most = ("memory.memsw.limit_in_bytes", limit) if first else ("memory.swap.max", 0)
            (folder / name).write_text(str(most))
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """A process that was killed takes a moment to leave."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.05)
    folder.rmdir()
