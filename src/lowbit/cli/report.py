"""``lowbit report``: a page about a quantized checkpoint."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.evaluate import measure, measure_against, read_text, text_windows
from lowbit.cli.loading import DType, find_folder, load_model
from lowbit.errors import PlanError

if TYPE_CHECKING:
    from lowbit.bench.report import Measured, Report

SUFFIXES = (".html", ".htm")


def command(
    path: Annotated[str, typer.Argument(metavar="DST", help="Folder of a quantized checkpoint, or a GGUF file.")],
    reference: Annotated[
        str | None, typer.Option(metavar="DENSE_FOLDER", help="The model that it was made from, to compare with.")
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text to measure perplexity on.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window; windows don't overlap.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Stop after this many windows.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="File to write; by default DST's name in this folder.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="In which to measure; auto: as stored.")] = DType.auto,
    device: Annotated[str | None, typer.Option(help="Where to measure: cpu, cuda:0, ..., or auto.")] = None,
) -> None:
    """Write a page about a quantized checkpoint: bits, errors and outliers of each layer, and what it costs."""
    folder = find_folder(path, gguf=True)
    dense = None if reference is None else find_folder(reference)
    target = _checked(Path(f"{folder.resolve().name}.html") if out is None else out)
    console.silence(bars=False)
    # What is wrong with the text or the windows is said before the weights are read.
    windows = None if text is None else text_windows(folder, read_text(text), seq_len, max_windows, dense)
    report = _collect(folder, dense)
    if text is not None:
        report = dataclasses.replace(report, measured=_measure(folder, dense, text, windows, dtype, device))
    _write(target, report)
    _print(report, target)


def _checked(target: Path) -> Path:
    """Find out before any work whether a page can be written there.

    Raises:
        PlanError: another suffix, a missing folder, or a folder of that name.
    """
    if target.suffix.lower() not in SUFFIXES:
        raise PlanError(f"a report is written as .html, not as '{target.name}'")
    if not target.absolute().parent.is_dir():
        raise PlanError(f"there is no folder '{target.absolute().parent}' to write the report to")
    if target.is_dir():
        raise PlanError(f"'{target}' is a folder; name a file")
    return target


def _collect(folder: Path, dense: Path | None) -> Report:
    from lowbit.bench.report import collect
    from lowbit.integrations.checkpoint import open_checkpoint

    with console.progress("reading", len(open_checkpoint(folder).weights)) as advance:
        return collect(folder, dense, advance=advance)


def _measure(folder: Path, dense: Path | None, text: Path, windows: Any, dtype: DType, device: str | None) -> Measured:
    from lowbit.bench.report import Measured

    model = load_model(folder, dtype=dtype, device=device)
    count, seq_len = windows.shape
    if dense is None:
        return Measured(text.name, count, seq_len, measure(model, windows)["perplexity"])
    found = measure_against(model, load_model(dense, dtype=dtype, device=device), windows)
    compared = found["reference"]
    return Measured(
        text=text.name,
        windows=count,
        seq_len=seq_len,
        perplexity=found["perplexity"],
        reference=compared["perplexity"],
        kl=compared["kl_divergence"],
        kl_error=compared["kl_standard_error"],
        agreement=compared["top1_agreement"],
    )


def _write(target: Path, report: Report) -> None:
    """Write the page beside its place and move it there, so that it is whole or as it was before."""
    from lowbit.bench.report import render

    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_text(render(report), encoding="utf-8", newline="\n")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _print(report: Report, target: Path) -> None:
    stored = sum(layer.stored_bytes for layer in report.layers)
    count = sum(layer.count for layer in report.layers)
    lines = [
        ("saved", str(target)),
        ("weights", f"{len(report.layers)} quantized, {len(report.kept)} kept"),
        ("bits per weight", f"{8 * stored / count:.3f}, all that the files hold of the quantized weights"),
    ]
    if report.measured is not None:
        lines.append(("perplexity", f"{report.measured.perplexity:.4f}"))
    if report.measured is not None and report.measured.kl is not None:
        lines.append(("KL divergence", f"{report.measured.kl:.5f} nats per token"))
    for name, value in lines:
        console.stdout().print(f"{name:<18}{value}", markup=False, soft_wrap=True)
