"""``lowbit inspect``: what a checkpoint's files hold, from headers and configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.loading import find_folder

if TYPE_CHECKING:
    from lowbit.core import Plan, QuantSpec


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, or a GGUF file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is quantized in a checkpoint, how, and in how many bits."""
    report, plan = describe(find_folder(path, gguf=True))
    if as_json:
        console.print_json(report)
    else:
        _print(report, plan)


def describe(folder: Path) -> tuple[dict[str, Any], Plan]:
    """The report that ``--json`` prints, and the plan that it was made from.

    Raises:
        FormatError: the files are damaged or in a format that no wire reads.
    """
    from lowbit.integrations.checkpoint import open_checkpoint
    from lowbit.wire.store import quantization_config

    if folder.is_dir() and quantization_config(folder) is None:
        return _describe_dense(folder)
    checkpoint = open_checkpoint(folder)
    plan = checkpoint.plan
    sizes = {
        name: (stored_bytes(spec, plan.shapes[name]), math.prod(plan.shapes[name]))
        for name, spec in plan.quantized.items()
    }
    weights = [
        {
            "name": name,
            "shape": list(plan.shapes[name]),
            "bits_per_weight": 8 * size / count,
            "spec": str(plan.quantized[name]),
        }
        for name, (size, count) in sizes.items()
    ]
    total = sum(size for size, _ in sizes.values()), sum(count for _, count in sizes.values())
    return _report(checkpoint.format, 8 * total[0] / total[1], weights, plan), plan


def stored_bytes(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Bytes of a weight's tensors under its spec: what ``QuantTensor.nbytes`` says, without reading it."""
    layout = spec.tensors((shape[0], shape[1])).values()
    return sum(math.prod(part) * dtype.itemsize for part, dtype in layout)


def _describe_dense(folder: Path) -> tuple[dict[str, Any], Plan]:
    from lowbit.core import Kept, Plan
    from lowbit.wire.store import CheckpointFiles, dtype_bits

    files = CheckpointFiles(folder)
    layouts = {name: files.layout(name) for name in files.names()}
    matrices = {name: layout for name, layout in layouts.items() if len(layout[0]) >= 2}
    entries = {
        name.removesuffix(".weight"): Kept(f"stored dense ({dtype.lower()})") for name, (_, dtype) in matrices.items()
    }
    plan = Plan(entries, {name.removesuffix(".weight"): shape for name, (shape, _) in matrices.items()})
    bits = sum(math.prod(shape) * dtype_bits(dtype) for shape, dtype in matrices.values())
    count = sum(math.prod(shape) for shape, _ in matrices.values())
    return _report("dense", bits / count if count else 0.0, [], plan), plan


def _report(form: str, bits: float, weights: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    kept = [{"name": name, "reason": entry.reason} for name, entry in plan.kept.items()]
    return {"format": form, "bits_per_weight": bits, "weights": weights, "kept": kept}


def _print(report: dict[str, Any], plan: Plan) -> None:
    out = console.stdout()
    out.print(f"format            {report['format']}")
    what = "the quantized weights" if report["weights"] else "all matrices"
    out.print(f"bits per weight   {report['bits_per_weight']:.3f}, counted over {what}")
    out.print(f"weights           {len(report['weights'])} quantized, {len(report['kept'])} kept")
    console.print_plan(plan)
