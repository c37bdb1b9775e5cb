"""``lowbit convert``: a quantized checkpoint in one format in, the same weights in another out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import console
from lowbit.cli.loading import DType, find_folder
from lowbit.cli.replace import check_target, replaced
from lowbit.errors import PlanError

if TYPE_CHECKING:
    import torch

    from lowbit.integrations.convert import Cost
    from lowbit.wire import Checkpoint

_TO_HELP = "A format, with a variant where it has some (awq:gemv, gguf:Q4_K_M, also of dense models); or dense."
_SHARD_HELP = "The most that one file of weights holds, as in 500MB; 2GB by default, of GGUF all."
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a quantized checkpoint, or a GGUF file.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; with --to gguf a file.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=_TO_HELP)],
    dtype: Annotated[DType, typer.Option(help="With --to dense; auto: what config.json names.")] = DType.auto,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round weights anew that FORMAT can't spell; says what it costs.")
    ] = False,
    shard_size: Annotated[str | None, typer.Option(metavar="SIZE", help=_SHARD_HELP)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in DST when done.")] = False,
) -> None:
    """Write a quantized model in another format, to the bit; refused where that can't be."""
    from lowbit.core import dtypes

    wanted = None if dtype is DType.auto else dtypes.parse(dtype.value)
    size = None if shard_size is None else parse_size(shard_size)
    place = find_source(source)
    name, _, variant = to.partition(":")
    console.silence(bars=False)
    if name == "gguf":
        if wanted is not None:
            raise PlanError("a dtype is for 'dense'; for a GGUF file in 16 bits there is --to gguf:F16")
        _convert_to_gguf(place, target, variant, requantize, size, overwrite)
    else:
        _convert_to_folder(place, target, to, wanted, requantize, size, overwrite)


def find_source(path: str) -> Path:
    """The GGUF file or the folder of a checkpoint.

    Raises:
        PlanError: there is none.
    """
    file = Path(path)
    return file if file.suffix == ".gguf" and file.is_file() else find_folder(path)


def _convert_to_folder(
    source: Path,
    target: Path,
    to: str,
    dtype: torch.dtype | None,
    requantize: bool,
    size: int | None,
    overwrite: bool,
) -> None:
    from lowbit.integrations.convert import Conversion, Target
    from lowbit.wire.shards import SHARD_BYTES

    goal = Target.parse(to, dtype=dtype, requantize=requantize)
    check_target(source, target, overwrite)
    if is_dense(source):
        raise PlanError(f"'{source}' is dense; 'lowbit quantize' quantizes it, and --to gguf:Q4_K_M writes a GGUF file")
    conversion = Conversion(_open(source), goal)
    with console.progress("reading", conversion.steps) as advance:
        conversion.prepare(advance)
        advance(description="writing")
        with replaced(target) as partial:
            cost = conversion.run(partial, advance, size or SHARD_BYTES)
    _print_saved(source, target)
    count = len(conversion.weights)
    if goal.wire is None:
        console.stdout().print(f"weights           {count} dequantized")
    else:
        console.stdout().print(f"weights           {count - cost.weights - cost.dense} of {count} to the bit")
    _print_cost(cost)


def _convert_to_gguf(
    source: Path, target: Path, type_name: str, requantize: bool, size: int | None, overwrite: bool
) -> None:
    from lowbit.integrations.convert_gguf import write_gguf

    if target.suffix != ".gguf" or target.is_dir():
        raise PlanError(f"'{target}' has to be the name of a file that ends in .gguf")
    if target.exists() and (target.samefile(source) or not overwrite):
        raise PlanError(f"'{target}' exists; --overwrite replaces it, unless it is the source itself")
    opened = source if is_dense(source) else _open(source)
    with console.progress("writing", 1) as bar:

        def advance(done: int, name: str, total: int) -> None:
            bar(done, description=name, total=total)

        cost = write_gguf(opened, target, type_name, requantize=requantize, advance=advance, part_bytes=size)
    _print_saved(source, target)
    _print_cost(cost)


def parse_size(text: str) -> int:
    """Bytes, from a number with a unit.

    Raises:
        PlanError: it is none.
    """
    number, unit = text.rstrip("BGMi"), text[len(text.rstrip("BGMi")) :]
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise PlanError(f"a size is a number and one of {', '.join(_UNITS)}, as in 2GB; not '{text}'")
    return size


def is_dense(source: Path) -> bool:
    """Whether a checkpoint's weights are all plain numbers."""
    from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles
    from lowbit.wire.store import quantization_config

    if source.is_dir():
        return quantization_config(source) is None
    return not GgufCheckpointFiles(source).types


def _open(source: Path) -> Checkpoint:
    from lowbit.integrations.checkpoint import open_checkpoint

    return open_checkpoint(source)


def _bytes(place: Path) -> int:
    from lowbit.bench import checkpoint_bytes

    if place.is_dir():
        return checkpoint_bytes(place)
    parts = [place] if place.exists() else place.parent.glob(f"{place.stem}-*-of-*.gguf")
    return sum(part.stat().st_size for part in parts)


def _print_saved(source: Path, target: Path) -> None:
    out = console.stdout()
    out.print(f"saved             {target}")
    out.print(f"size              {_bytes(source) / 1e6:.1f} MB before, {_bytes(target) / 1e6:.1f} MB now")


def _print_cost(cost: Cost) -> None:
    out = console.stdout()
    if cost.dense:
        out.print(f"dense             {cost.dense}, whose shapes the format can't hold")
    if cost.weights:
        out.print(f"rounded anew      {cost.weights}: changed by {cost.mean:.3%} on average,")
        out.print(f"                  at most by {cost.most:.3g}, in {cost.where}")
