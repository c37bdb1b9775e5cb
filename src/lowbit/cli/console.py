"""What the commands print: results on stdout, progress and everything else on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from lowbit.core import Plan

_WIDTH_OF_FILES = 180  # columns of a table that goes to a file or a pipe, where nothing needs to fit a screen


def stdout() -> Console:
    """The console for results."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_FILES)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object to stdout."""
    print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def silence(bars: bool) -> None:
    """Keep Transformers' remarks off the screen, and with `bars` its progress bars and all warnings too.

    Bars are for terminals in any case.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    if bars or not sys.stderr.isatty():
        logging.disable_progress_bar()
    if bars:
        warnings.filterwarnings("ignore")


def note(text: str) -> None:
    """Say something on stderr."""
    print(text, file=sys.stderr)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time left on stderr, only where that is a terminal.

    Yields:
        A function to call with how much has been done since the last call, and optionally a new `description` or
        `total`.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def advance(done: int = 0, description: str | None = None, total: int | None = None) -> None:
            bar.update(task, advance=done, description=description, total=total)

        yield advance


def print_plan(plan: Plan) -> None:
    """A plan as a table on stdout; layers with the same fate share a line."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("weight", "shape", "what becomes of it"):
        table.add_column(title, overflow="fold")
    for row in plan.rows():
        table.add_row(*map(escape, row))
    stdout().print(table)
