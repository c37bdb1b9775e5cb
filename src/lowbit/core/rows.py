"""Some rows of a quantized weight, without touching the others."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowbit.core.reference import dequantize
from lowbit.core.spec import QuantSpec

_STRIP = 1 << 18  # weights: a mebibyte in fp32, which a core's own cache holds
_LEVELS = ("scales", "zeros")
_WHOLE = frozenset({"table", "codebooks", "group_index"})


def dequantize_rows(
    spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """``W[rows]`` of `dtype`, with the bits that :func:`dequantize` gives these rows.

    Args:
        rows: numbers of rows, one axis. Where rows share tensors with each other, all are dequantized.
    """
    if not can_select_rows(spec, shape):
        return dequantize(spec, tensors, shape, dtype).index_select(0, rows)
    return dequantize(spec, select_rows(tensors, shape, rows), (len(rows), shape[1]), dtype)


def dequantize_in_strips(
    spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """What :func:`dequantize` gives, made a strip at a time: of rows that don't share tensors, or of flat groups.

    The steps of the arithmetic then take memory for a strip and not for the whole weight, and find it in the cache.
    """
    if spec.grouping.flat and tensors["codes"].device.type == "cpu":
        return _flat_strips(spec, tensors, shape, dtype)
    rows = max(1, _STRIP // max(1, shape[1]))
    if shape[0] <= rows or tensors["codes"].device.type != "cpu" or not can_select_rows(spec, shape):
        return dequantize(spec, tensors, shape, dtype)
    result = torch.empty(shape, dtype=dtype)
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        strip = _each(tensors, shape, operator.itemgetter(slice(first, last)))
        result[first:last] = dequantize(spec, strip, (last - first, shape[1]), dtype)
    return result


def _flat_strips(spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Groups that run over the ends of rows are cut where a group ends, and the scale of its scale, and a byte."""
    count, group = shape[0] * shape[1], spec.grouping.cols
    levels = (spec.scale.second, spec.zero.second if spec.zero else None)
    strip = math.lcm(8, group, *(group * level.size for level in levels if level and level.size))
    strip *= max(1, _STRIP // strip)
    packed = any(level and level.kind == "integer" for level in levels) or (spec.zero and spec.zero.kind == "integer")
    if count <= strip or packed or tensors["codes"].dim() != 1:
        return dequantize(spec, tensors, shape, dtype)
    per = {"codes": (8, spec.bits), "scales": (group, 1), "zeros": (group, 1)}
    per |= {f"super_{name}": (group * level.size, 1) for name, level in zip(_LEVELS, levels, strict=True) if level}
    result = torch.empty(count, dtype=dtype)
    for first in range(0, count, strip):
        last = min(first + strip, count)
        part = {
            name: tensor[first * per[name][1] // per[name][0] : -(-last * per[name][1] // per[name][0])]
            if name in per and per[name][0]
            else tensor
            for name, tensor in tensors.items()
        }
        result[first:last] = dequantize(spec, part, (1, last - first), dtype).view(-1)
    return result.view(shape)


def can_select_rows(spec: QuantSpec, shape: tuple[int, int]) -> bool:
    """Whether every row has tensors of its own, but for tables."""
    grouping = spec.grouping
    if grouping.linear or grouping.rows != 1 or getattr(spec.code, "out_group", 1) != 1:
        return False
    groups = grouping.counts(shape)[1]
    levels = (spec.scale.second, spec.zero.second if spec.zero else None)
    return all(level is None or level.size == 0 or groups % level.size == 0 for level in levels)


def select_rows(tensors: Mapping[str, Tensor], shape: tuple[int, int], rows: Tensor) -> dict[str, Tensor]:
    """The tensors of the weight ``W[rows]``, where :func:`can_select_rows` holds."""
    return _each(tensors, shape, lambda tensor: _take(tensor, rows))


def _each(tensors: Mapping[str, Tensor], shape: tuple[int, int], take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`take` of every tensor that has rows; what all rows share is left as it is."""
    selected = {}
    for name, tensor in tensors.items():
        shared = name in _WHOLE or tensor.numel() == 1 != shape[0] or name.endswith(("_table", "_offset"))
        if shared or name.startswith(("input_", "output_")):
            selected[name] = tensor
        elif name.startswith("super_"):
            selected[name] = take(tensor.view(shape[0], -1)).reshape(-1)
        else:
            selected[name] = take(tensor)
    return selected


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    # Not every device can index 8-bit floats.
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return raw.index_select(0, rows).view(tensor.dtype)
