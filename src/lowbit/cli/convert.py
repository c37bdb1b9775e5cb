"""``lowbit convert``: a quantized checkpoint in one format in, the same weights in another out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.loading import DType, find_folder
from lowbit.cli.replace import check_target, replaced
from lowbit.errors import PlanError

if TYPE_CHECKING:
    from lowbit.integrations.convert import Conversion, Cost

_TO_HELP = "A format, with a variant where it has some (awq:gemv, gptq:v2); dense for plain weights."
_SHARD_HELP = "The most that one file of weights holds, as in 500MB or 2GB."
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a quantized checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=_TO_HELP)],
    dtype: Annotated[DType, typer.Option(help="With --to dense; auto: what config.json names.")] = DType.auto,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round weights anew that FORMAT can't spell; says what it costs.")
    ] = False,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help=_SHARD_HELP)] = "2GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in DST when done.")] = False,
) -> None:
    """Write a quantized model in another format, to the bit; refused where that can't be."""
    from lowbit.core import dtypes
    from lowbit.integrations.convert import Conversion, Target

    wanted = None if dtype is DType.auto else dtypes.parse(dtype.value)
    goal = Target.parse(to, dtype=wanted, requantize=requantize)
    size = parse_size(shard_size)
    folder = find_folder(source)
    check_target(folder, target, overwrite)
    console.silence(bars=False)
    conversion = Conversion(_open(folder), goal)
    with console.progress("reading", conversion.steps) as advance:
        conversion.prepare(advance)
        advance(description="writing")
        with replaced(target) as partial:
            cost = conversion.run(partial, advance, size)
    _print_result(conversion, cost, folder, target)


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


def _open(folder: Path) -> Any:
    from lowbit.integrations.checkpoint import open_checkpoint
    from lowbit.wire.store import quantization_config

    if quantization_config(folder) is None:
        raise PlanError(f"'{folder}' is dense; 'lowbit quantize' quantizes it")
    return open_checkpoint(folder)


def _print_result(conversion: Conversion, cost: Cost, source: Path, target: Path) -> None:
    from lowbit.bench import checkpoint_bytes

    out = console.stdout()
    count = len(conversion.weights)
    out.print(f"saved             {target}")
    out.print(
        f"size              {checkpoint_bytes(source) / 1e6:.1f} MB before, {checkpoint_bytes(target) / 1e6:.1f} MB now"
    )
    if conversion.target.wire is None:
        out.print(f"weights           {count} dequantized")
        return
    out.print(f"weights           {count - cost.weights - cost.dense} of {count} to the bit")
    if cost.dense:
        out.print(f"dense             {cost.dense}, whose shapes the format can't hold")
    if cost.weights:
        out.print(f"rounded anew      {cost.weights}: changed by {cost.mean:.3%} on average,")
        out.print(f"                  at most by {cost.most:.3g}, in {cost.where}")
