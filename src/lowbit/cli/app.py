"""The commands, and what becomes of errors.

Every mistake of the user's ends with status 2 and one line on stderr, an interruption with 130 and one line, anything
else is a bug and shows its traceback. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from lowbit.cli import convert, demo, doctor, evaluate, inspect, methods, quantize, recommend, report
from lowbit.errors import LowbitError

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    name="lowbit",
    help="Quantize, convert, inspect and measure Hugging Face Transformers models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize.command)
app.command("convert")(convert.command)
app.command("inspect")(inspect.command)
app.command("eval")(evaluate.command)
app.command("demo")(demo.command)
app.command("doctor")(doctor.command)
app.command("methods")(methods.command)
app.command("recommend")(recommend.command)
app.command("report")(report.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        import lowbit

        typer.echo(lowbit.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere in the line.")
    ] = False,
) -> None:
    """The options before the command; `main` takes ``--debug`` out beforehand."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    _prepare_process()
    try:
        status: Any = app([word for word in words if word != "--debug"] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        message = _user_message(error)
        if debug or message is None:
            raise
        print(f"lowbit: {message}", file=sys.stderr)
        return USER_ERROR
    if status == INTERRUPTED:
        print("lowbit: interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _user_message(error: Exception) -> str | None:
    """One line about a mistake of the user's; None for anything else."""
    if hasattr(error, "format_message"):  # what typer raises for wrong options, under different names over its versions
        text = str(error.format_message())
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, LowbitError | OSError):
        text = str(error)
    elif type(error).__name__ == "OutOfMemoryError":  # torch's; not imported for its name alone
        text = f"the device ran out of memory: {error}"
    else:
        return None
    first, *others = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return f"{first.rstrip(':')} (more with --debug)" if others else first


def _prepare_process() -> None:
    """Be a good neighbour: no spinning threads, and clean up when asked to stop."""
    # Has to happen before torch starts its threads. They spin at every barrier unless told otherwise; where another
    # program needs the core, each spin then costs a time slice, which makes small models ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Turn SIGTERM into an exception, so that half-written folders are removed."""
    raise SystemExit(128 + number)
