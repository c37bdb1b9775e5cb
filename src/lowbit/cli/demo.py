"""``lowbit demo``: every way to quantize, on the model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import console

if TYPE_CHECKING:
    from lowbit.bench.demo import Row

_NUMBERS = 82  # columns that the table takes without the text
_WIDE = _NUMBERS + 30


def command(
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw bits per weight against perplexity.")] = None,
    max_windows: Annotated[
        int, typer.Option(min=1, help="Windows of 256 tokens to measure on; the embedded text has 24.")
    ] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize the embedded model in every way, save it, load it with plain Transformers, and compare."""
    console.silence(bars=True)
    from lowbit.bench.plot import check_plot_file, draw

    if plot is not None:
        check_plot_file(plot)
    rows, tokens = measure(max_windows)
    if as_json:
        console.print_json({"tokens": tokens, "rows": [row.to_dict() for row in rows]})
    else:
        _print(rows, tokens)
    if plot is not None:
        draw(rows, plot)
        console.note(f"plot saved to {plot}")


def measure(max_windows: int) -> tuple[list[Row], int]:
    """All rows, and how many tokens each perplexity is over."""
    from transformers import AutoTokenizer

    from lowbit.bench.demo import METHODS, MODEL, demo_windows, run_demo

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    windows = demo_windows(tokenizer, max_windows)
    rows: list[Row] = []
    with console.progress(METHODS[0].name, len(windows) * len(METHODS)) as advance:
        for row in run_demo(windows, tokenizer, METHODS, advance):
            rows.append(row)
            advance(description=METHODS[min(len(rows), len(METHODS) - 1)].name)
    return rows, windows.numel() - len(windows)


def _print(rows: list[Row], tokens: int) -> None:
    """One table; where the screen is too narrow for it, what the models wrote stands below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from lowbit.bench.demo import PROMPT

    out = console.stdout()
    wide = out.width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for title in ("bits per\nweight", "MB", "perplexity", "change", "tokens\nper s"):
        table.add_column(title, justify="right", no_wrap=True)
    if wide:
        table.add_column(f'"{PROMPT} ..."', no_wrap=True, overflow="ellipsis", max_width=out.width - _NUMBERS)
    for row in rows:
        table.add_row(*_cells(row), *([escape(row.text)] if wide else []))
    out.print(table)
    if not wide:
        out.print(f'"{PROMPT} ..."')
        for row in rows:
            out.print(f"{row.method}: {row.text}", markup=False, no_wrap=True, overflow="ellipsis")
        out.print()
    out.print(
        "Bits per weight: of the quantized layers, scales and zeros included; the tied embedding stays in 16 bits."
        f" Perplexity: {tokens} tokens sampled from the model itself."
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        f"{row.bits_per_weight:.3f}",
        f"{row.size_mb:.2f}",
        f"{row.perplexity:.2f}",
        f"{round(row.change, 2) + 0.0:+.2f}",  # no minus before zero
        f"{row.tokens_per_second:.0f}",
    )
