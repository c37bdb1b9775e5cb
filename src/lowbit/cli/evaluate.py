"""``lowbit eval``: perplexity and memory of a model, its distance from a reference, and benchmarks of lm-eval."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.loading import DType, find_folder, load_model, load_tokenizer
from lowbit.errors import LowbitError, PlanError

if TYPE_CHECKING:
    from lowbit.bench import Comparison

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_COLUMN = 18  # where the numbers begin


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, dense or quantized; or a GGUF.")],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text to measure on.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window; windows don't overlap.")] = 1024,
    dtype: Annotated[DType, typer.Option(help="Of dense weights and activations; auto: as stored.")] = DType.auto,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, ..., or auto to spread the model over all.")] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Stop after this many windows.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare the predictions with this model's, dense or quantized.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAMES", help="Tasks of lm-eval, separated by commas.")] = None,
    task_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with further tasks (YAML).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task; all by default.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples before each; as the task says.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a task per forward pass.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model's perplexity on a text, its bits per weight, its memory; compare it; run benchmarks on it."""
    if text is None and (reference is not None or tasks is None):
        raise PlanError("give a text to measure on with --text FILE" + ("" if reference else ", or --tasks NAMES"))
    console.silence(bars=as_json)
    folder = find_folder(path, gguf=True)
    compared = None if reference is None else find_folder(reference, gguf=True)
    names, manager = (None, None) if tasks is None else _checked_tasks(tasks, task_path)
    windows = None if text is None else text_windows(folder, read_text(text), seq_len, max_windows, compared)

    model = load_model(folder, dtype=dtype, device=device)
    started = time.perf_counter()
    if windows is None:
        report = _sizes(model)
    elif compared is None:
        report = measure(model, windows)
    else:
        report = measure_against(model, load_model(compared, dtype=dtype, device=device), windows)
    seconds = time.perf_counter() - started
    if names is not None:
        options = {"manager": manager, "limit": limit, "shots": shots, "batch_size": batch_size}
        report["tasks"] = _run_tasks(model, load_tokenizer(folder), names, quiet=as_json, **options)
    if as_json:
        console.print_json(report)
    else:
        _print(report, windows, seconds, reference)


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
    from lowbit.bench import perplexity

    with console.progress("evaluating", len(windows)) as advance:
        measured = perplexity(model, windows, on_windows=advance)
    return {"perplexity": measured.value, "tokens": measured.tokens, **_sizes(model)}


def measure_against(model: Any, reference: Any, windows: Any) -> dict[str, Any]:
    """The same with what ``--reference`` adds to it."""
    from lowbit.bench import compare

    with console.progress("comparing", len(windows)) as advance:
        found = compare(model, reference, windows, on_windows=advance)
    own = {"perplexity": found.model.value, "tokens": found.model.tokens, **_sizes(model)}
    return {**own, "reference": _compared(found)}


def _compared(found: Comparison) -> dict[str, Any]:
    return {
        "perplexity": found.reference.value,
        "perplexity_ratio": found.ratio,
        "positions": found.positions,
        "kl_divergence": found.divergence,
        "kl_standard_error": found.standard_error,
        "kl_percentile_99": found.percentile_99,
        "top1_agreement": found.agreement,
    }


def _sizes(model: Any) -> dict[str, Any]:
    from lowbit.bench import bits_per_weight

    return {"bits_per_weight": bits_per_weight(model), "memory_bytes": model.get_memory_footprint()}


def _print(report: dict[str, Any], windows: Any, seconds: float, reference: str | None) -> None:
    def line(name: str, value: str) -> None:
        out.print(f"{name:{_COLUMN - 1}} {value}", markup=False)

    out = console.stdout()
    if windows is not None:
        count, seq_len = windows.shape
        rate = windows.numel() / seconds
        line("perplexity", f"{report['perplexity']:.4f}")
        line("tokens", f"{report['tokens']} predicted, {count} windows of {seq_len}, {rate:.0f} tokens/s")
    line("bits per weight", f"{report['bits_per_weight']:.3f}")
    line("memory", f"{report['memory_bytes'] / 1e6:.1f} MB")
    if "reference" in report:
        found = report["reference"]
        error = found["kl_standard_error"]
        spread = "" if error is None else f" ± {error:.5f}"
        line("reference", f"perplexity {found['perplexity']:.4f} ({reference})")
        line("perplexity ratio", f"{found['perplexity_ratio']:.5f}")
        line("KL divergence", f"{found['kl_divergence']:.5f}{spread} nats per token, {found['positions']} positions")
        line("99th percentile", f"{found['kl_percentile_99']:.5f}")
        line("top-1 agreement", f"{found['top1_agreement']:.2%}")
    for task, scores in report.get("tasks", {}).items():
        line(task, ", ".join(_score(name, scores) for name in scores if not name.split(" ")[0].endswith("_stderr")))


def _score(name: str, scores: dict[str, float]) -> str:
    metric, *by = name.split(" ")
    error = scores.get(" ".join([f"{metric}_stderr", *by]))
    return f"{name} {scores[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def text_windows(folder: Path, text: str, seq_len: int, most: int | None, reference: Path | None) -> Any:
    """The text in windows; what is wrong with them is found before a model is loaded."""
    from lowbit.bench import check_seq_len, check_vocabularies, token_windows

    config = _config(folder)
    check_seq_len(config, seq_len)
    if reference is not None:
        check_seq_len(_config(reference), seq_len)
        check_vocabularies(config, _config(reference))
    windows = token_windows(load_tokenizer(folder), text, seq_len)[:most]
    if reference is not None and _has_tokenizer(reference):
        _check_same_tokens(windows, token_windows(load_tokenizer(reference), text, seq_len)[:most])
    return windows


def _config(folder: Path) -> Any:
    import lowbit

    try:
        return lowbit.AutoConfig.from_pretrained(folder)
    except LowbitError:
        raise
    except (OSError, ValueError) as error:
        raise PlanError(f"Transformers can't read the config of '{folder}': {error}") from error


def _has_tokenizer(folder: Path) -> bool:
    return folder.is_file() or any((folder / name).is_file() for name in _TOKENIZERS)


def _check_same_tokens(windows: Any, others: Any) -> None:
    import torch

    if not torch.equal(windows, others):
        raise PlanError(
            "the reference's tokenizer turns the text into other tokens than the model's;"
            " only models with one vocabulary can be compared"
        )


def _checked_tasks(tasks: str, include: Path | None) -> tuple[list[str], Any]:
    """The names, and the harness' manager, which knows them."""
    from lowbit.bench.tasks import check_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return names, check_tasks(names, include)


def _run_tasks(model: Any, tokenizer: Any, names: Sequence[str], *, quiet: bool, **options: Any) -> Any:
    from lowbit.bench.tasks import run_tasks

    if quiet:
        for harness in ("lm_eval", "datasets"):
            logging.getLogger(harness).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report
        return run_tasks(model, tokenizer, names, **options)
