"""One layer: from a dense weight and statistics to a quantized one with a report, and back into the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.report import LayerReport, measured
from lowbit.algorithms.statistics import Statistics
from lowbit.calibration.job import BlockResult
from lowbit.calibration.units import Unit
from lowbit.core import QuantTensor
from lowbit.errors import PlanError


def solve(
    units: Sequence[Unit],
    weights: Sequence[Tensor],
    statistics: Statistics,
    algorithm_of: Callable[[str], Algorithm],
) -> list[tuple[QuantTensor, LayerReport]]:
    """Quantize weights ``fp32 [out, in]`` with the same inputs; algorithms that can do so share what they factorize.

    Raises:
        PlanError: a weight can't be quantized; names it, or those that were quantized together.
    """
    algorithms = [algorithm_of(unit.name) for unit in units]
    many = getattr(algorithms[0], "calibrated_many", None)
    if many is not None and all(one is algorithms[0] for one in algorithms):
        with _about(units):
            return list(many(list(weights), [unit.spec for unit in units], statistics))
    made = []
    for unit, weight, algorithm in zip(units, weights, algorithms, strict=True):
        single = getattr(algorithm, "calibrated_with_report", None)
        with _about([unit]):
            if single is not None:
                made.append(single(weight, unit.spec, statistics))
                continue
            tensor = algorithm.calibrated(weight, unit.spec, statistics)
        made.append((tensor, measured(weight, tensor, statistics)))
    return made


@contextmanager
def _about(units: Sequence[Unit]) -> Iterator[None]:
    """Let errors of an algorithm, which knows no names, say what they are about."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{', '.join(unit.name for unit in units)}: {error}") from error


def describe(
    unit: Unit, tensor: QuantTensor, report: LayerReport, notes: list[str], tokens: int, seconds: float
) -> dict[str, Any]:
    """What the report of a run says of one unit."""
    facts = {key: value for key, value in asdict(report).items() if key != "notes"}
    return {
        "name": unit.name,
        "shape": list(unit.shape),
        "spec": str(tensor.spec),
        "bits_per_weight": tensor.bits_per_weight,
        **facts,
        "tokens": tokens,
        "seconds": seconds,
        "notes": notes,
    }


def put_unit(module: nn.Module, unit: Unit, tensor: QuantTensor) -> None:
    """Let a dense module compute with the quantized weight."""
    place = unit.weight(module)
    dense = tensor.to(str(place.device)).dequantize(tensor.spec.dtype)
    place.copy_(dense.to(place.dtype))


def put_result(block: nn.Module, prefix: str, units: Sequence[Unit], result: BlockResult) -> None:
    """Let a dense block compute as it was quantized before."""
    for unit in units:
        put_unit(block.get_submodule(unit.module.removeprefix(prefix).removeprefix(".")), unit, result.units[unit.name])
    put_dense(block, prefix, result)


def put_dense(block: nn.Module, prefix: str, result: BlockResult) -> None:
    """Let a block compute with its changed parameters as they are filed, which may be in a narrower dtype."""
    for name, value in result.dense.items():
        block.get_parameter(name.removeprefix(f"{prefix}.")).data.copy_(value)
