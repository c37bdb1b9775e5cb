"""Some rows of a quantized weight, without touching the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.core.reference import dequantize
from lowbit.core.spec import QuantSpec

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
    selected = {}
    for name, tensor in tensors.items():
        shared = name in _WHOLE or tensor.numel() == 1 != shape[0] or name.endswith(("_table", "_offset"))
        if shared or name.startswith(("input_", "output_")):
            selected[name] = tensor
        elif name.startswith("super_"):
            selected[name] = tensor.view(shape[0], -1).index_select(0, rows).reshape(-1)
        else:
            selected[name] = _take(tensor, rows)
    return selected


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    # Not every device can index 8-bit floats.
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return raw.index_select(0, rows).view(tensor.dtype)
