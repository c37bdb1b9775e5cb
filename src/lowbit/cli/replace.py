"""Writing a folder so that it is there as a whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import PlanError


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Find out before any work whether `target` may be written.

    Raises:
        PlanError: it is the source or holds it, is a file, or is not empty (unless `overwrite` is given and it holds a
            checkpoint).
    """
    source, target = source.resolve(), target.resolve()
    if source == target:
        raise PlanError(f"'{target}' is the source itself; write to another folder")
    if target in source.parents:
        raise PlanError(f"'{target}' holds the source, which would be lost; write to another folder")
    if target.exists() and not target.is_dir():
        raise PlanError(f"'{target}' is a file")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise PlanError(f"'{target}' is not empty; --overwrite replaces it")
    if not (target / "config.json").is_file():
        raise PlanError(f"'{target}' holds something that is not a checkpoint; it is not overwritten")


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Fill a new folder beside `target` that takes its place at the end; after an error, `target` is as it was.

    A process that is killed outright leaves `target` as it was too, and beside it a hidden folder ``.NAME.partial-*``.

    Yields:
        The folder to fill.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    partial, old = (target.with_name(f".{target.name}.{kind}-{mark}") for kind in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
