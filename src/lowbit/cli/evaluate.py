"""``lowbit eval``: perplexity and memory of a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.loading import DType, find_folder, load_model, load_tokenizer
from lowbit.errors import PlanError


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, dense or quantized.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to measure on.")],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window; windows don't overlap.")] = 1024,
    dtype: Annotated[DType, typer.Option(help="Of dense weights and activations; auto: as stored.")] = DType.auto,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, ..., or auto to spread the model over all.")] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Stop after this many windows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model's perplexity on a text, its bits per weight and its memory."""
    folder, content = find_folder(path, gguf=True), read_text(text)
    console.silence(bars=as_json)
    windows = _windows(folder, content, seq_len)[:max_windows]
    model = load_model(folder, dtype=dtype, device=device)
    started = time.perf_counter()
    report = measure(model, windows)
    rate = windows.numel() / (time.perf_counter() - started)
    if as_json:
        console.print_json(report)
        return
    out = console.stdout()
    out.print(f"perplexity        {report['perplexity']:.4f}")
    out.print(
        f"tokens            {report['tokens']} predicted, {len(windows)} windows of {seq_len}, {rate:.0f} tokens/s"
    )
    out.print(f"bits per weight   {report['bits_per_weight']:.3f}")
    out.print(f"memory            {report['memory_bytes'] / 1e6:.1f} MB")


def read_text(file: Path) -> str:
    """A UTF-8 file as it is, line ends included.

    Raises:
        PlanError: it can't be read, or is not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise PlanError(f"the text '{file}' can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"the text '{file}' is not UTF-8: {error.reason} at byte {error.start}") from error


def measure(model: Any, windows: Any) -> dict[str, Any]:
    """The report that ``--json`` prints."""
    from lowbit.bench import bits_per_weight, perplexity

    with console.progress("evaluating", len(windows)) as advance:
        measured = perplexity(model, windows, on_windows=advance)
    return {
        "perplexity": measured.value,
        "tokens": measured.tokens,
        "bits_per_weight": bits_per_weight(model),
        "memory_bytes": model.get_memory_footprint(),
    }


def _windows(folder: Path, text: str, seq_len: int) -> Any:
    """The text in windows; what is wrong with them is found before the model is loaded."""
    from transformers import AutoConfig

    from lowbit.bench import check_seq_len, token_windows

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise PlanError(f"Transformers can't read the config of '{folder}': {error}") from error
    check_seq_len(config, seq_len)
    return token_windows(load_tokenizer(folder), text, seq_len)
