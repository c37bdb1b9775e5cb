"""``lowbit methods``: which quantization method does what."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from lowbit.cli import console


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/methods.md.")] = False,
) -> None:
    """Show what every method can do: devices, bits, saving, training, conversion; found out by doing it here."""
    console.silence(bars=True)
    from lowbit.integrations.transformers import capabilities

    if as_json:
        entries = [entry.as_json() for entry in capabilities.capabilities()]
        console.print_json({"methods": entries, "evidence": capabilities.EVIDENCE})
    elif as_markdown:
        print(capabilities.markdown())
    else:
        _print(capabilities.table())


def _print(rows: list[list[str]]) -> None:
    titles, *rest = rows
    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rest:
        table.add_row(*row)
    console.stdout().print(table)
