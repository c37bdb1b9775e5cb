"""``--to gguf``: a file for llama.cpp of a checkpoint in any format, dense ones included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowbit.core import QuantTensor
from lowbit.integrations.checkpoint import open_checkpoint
from lowbit.integrations.convert import Cost
from lowbit.integrations.transformers.gguf.export import write_gguf_model
from lowbit.wire import Checkpoint

Advance = Callable[[int, str, int], None]


def write_gguf(
    source: Path | Checkpoint,
    file: Path,
    type_name: str,
    *,
    requantize: bool = False,
    advance: Advance = lambda done, name, total: None,
    part_bytes: int | None = None,
) -> Cost:
    """Write a GGUF file, and measure what that has changed of weights that were quantized before.

    Args:
        source: a dense folder, or a quantized checkpoint.
        type_name: ``Q4_K_M``, ``Q8_0``, ...; empty to keep the numbers as they are.
        advance: called after each tensor with 1, its name, and how many there are.

    Raises:
        FormatError: llama.cpp has nothing for this model or one of its weights.
        PlanError: the same.
    """
    files = write_gguf_model(
        source,
        file,
        type_name or None,
        requantize=requantize,
        progress=lambda name, number, total: advance(1, name, total),
        part_bytes=part_bytes,
    )
    cost = Cost()
    if requantize and isinstance(source, Checkpoint):
        _measure(cost, source, files[0])
    return cost


def _measure(cost: Cost, source: Checkpoint, file: Path) -> None:
    after = open_checkpoint(file).weights
    for name, before in source.weights.items():
        if name in after and not _same(before, after[name]):
            cost.add(name, before.dequantize(), after[name].dequantize())


def _same(before: QuantTensor, after: QuantTensor) -> bool:
    left, right = before.dequantize(), after.dequantize()
    return bool(((left == right) | (left.isnan() & right.isnan())).all())
