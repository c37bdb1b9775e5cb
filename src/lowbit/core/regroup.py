"""From one grouping to another: numbers per group, repeated or merged."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.qtensor import QuantTensor
from lowbit.core.spec import Grouping
from lowbit.errors import SpecError


def regroup(per_group: Tensor, tensor: QuantTensor, target: Grouping, what: str) -> Tensor:
    """One number per group of `tensor`, as one per group of `target`.

    Args:
        per_group: in the shape ``tensor.spec.grouping.counts(tensor.shape)``.
        what: how an error calls the numbers.

    Returns:
        In the shape ``target.counts(tensor.shape)``.

    Raises:
        SpecError: weights that share a group of `target` have different numbers.
    """
    source, shape = tensor.spec.grouping, tensor.shape
    counts = target.counts(shape)
    if source == target or _same_order(source, target, shape):
        return per_group.reshape(counts)
    if not (source.linear or target.linear or source.permuted or target.permuted):
        rows, cols = _sides(source, shape)
        wanted_rows, wanted_cols = _sides(target, shape)
        if rows % wanted_rows == 0 and cols % wanted_cols == 0:
            tall = per_group.repeat_interleave(rows // wanted_rows, 0)[: counts[0]]
            return tall.repeat_interleave(cols // wanted_cols, 1)[:, : counts[1]].contiguous()
    full = spread(per_group, source, shape, tensor.tensors.get("group_index"))
    merged = per_group.new_empty(counts).reshape(-1)
    numbers = _numbers(target, shape, tensor.tensors.get("group_index"), per_group.device)
    merged[numbers.reshape(-1)] = full.reshape(-1)
    if not torch.equal(_bits(merged[numbers]), _bits(full)):
        raise SpecError(f"'{target}' would share {what} that differ in '{source}'")
    return merged.reshape(counts)


def spread(per_group: Tensor, grouping: Grouping, shape: tuple[int, int], group_index: Tensor | None) -> Tensor:
    """One number per group as one per weight, ``[out, in]``."""
    return per_group.reshape(-1)[_numbers(grouping, shape, group_index, per_group.device)]


def coarser(target: Grouping, source: Grouping) -> bool:
    """Whether groups of `target` would join groups of `source`, in weights of whatever shape."""
    if source == target:
        return False
    if source.strided or target.strided or (target.flat and source.flat):
        return not (source.flat and target.flat and source.cols % target.cols == 0)
    rows_join = (target.rows == 0 and source.rows != 0) or (target.rows > 0 and source.rows % target.rows != 0)
    cols_join = (target.cols == 0 and source.cols != 0) or (target.cols > 0 and source.cols % target.cols != 0)
    return rows_join or cols_join


def _same_order(source: Grouping, target: Grouping, shape: tuple[int, int]) -> bool:
    """Whether both number the same groups alike: blocks that don't straddle rows are groups of them."""
    if source.strided or target.strided or source.permuted or target.permuted:
        return False
    if source.rows != 1 or target.rows != 1:
        return _sides(source, shape) == _sides(target, shape) and not (source.flat or target.flat)
    return (source.cols or shape[1]) == (target.cols or shape[1]) and shape[1] % (source.cols or shape[1]) == 0


def _sides(grouping: Grouping, shape: tuple[int, int]) -> tuple[int, int]:
    return grouping.rows or shape[0], grouping.cols or shape[1]


def _numbers(grouping: Grouping, shape: tuple[int, int], group_index: Tensor | None, device: torch.device) -> Tensor:
    """The number of each weight's group in the order in which groups are stored, ``int64 [out, in]``."""
    if grouping.linear:
        order = torch.arange(shape[0] * shape[1], device=device)
        numbers = order % grouping.counts(shape)[0] if grouping.strided else order // grouping.cols
        return numbers.view(shape)
    rows, cols = _sides(grouping, shape)
    across = torch.arange(shape[1], device=device) // cols
    if grouping.permuted and group_index is not None:
        across = group_index.to(torch.int64)
    down = torch.arange(shape[0], device=device) // rows
    return down.unsqueeze(1) * grouping.counts(shape)[1] + across


def _bits(values: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself."""
    return values.contiguous().view(torch.uint8)
