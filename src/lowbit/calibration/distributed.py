"""Several processes on one run (``torchrun``), with the bits of a single one.

The batches are dealt out in a fixed number of runs, whatever the number of processes; sums over them are made run by
run and added up along one fixed tree. So no rounding depends on who computed what.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.core import QuantSpec, QuantTensor

LEAVES: Final = 8  # runs of batches; more processes than this have nothing to do


def world() -> tuple[int, int]:
    """``(rank, processes)``; ``(0, 1)`` where there is but one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leaf_of(batch: int, batches: int) -> int:
    """The run that a batch belongs to."""
    return batch * LEAVES // max(1, batches)


def owner_of(leaf: int) -> int:
    """The process that works on a run."""
    return leaf * min(world()[1], LEAVES) // LEAVES


def owns(batch: int, batches: int) -> bool:
    """Whether a batch is this process's."""
    return owner_of(leaf_of(batch, batches)) == world()[0]


def share(value: Any, source: int) -> Any:
    """An object of plain data and tensors on the CPU from one process to all."""
    if world()[1] == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=source)
    return holder[0]


def gather(value: Any) -> list[Any]:
    """What each process has, in the order of the processes; plain data and tensors on the CPU."""
    processes = world()[1]
    if processes == 1:
        return [value]
    found: list[Any] = [None] * processes
    dist.all_gather_object(found, value)
    return found


def share_tensor(value: Tensor | None, source: int, device: torch.device) -> Tensor | None:
    """A tensor, or None, from one process to all."""
    if world()[1] == 1:
        return value
    described = share(None if value is None else (tuple(value.shape), value.dtype), source)
    if described is None:
        return None
    shape, dtype = described
    found = (
        value.contiguous()
        if value is not None and world()[0] == source
        else torch.empty(shape, dtype=dtype, device=device)
    )
    dist.broadcast(found.view(torch.uint8) if dtype.itemsize == 1 else found, src=source)
    return found


def share_quantized(tensor: QuantTensor | None, source: int) -> QuantTensor:
    """A quantized weight from one process to all; on the CPU, where there are several."""
    if tensor is not None and world()[1] == 1:
        return tensor
    described = None if tensor is None else (tensor.spec.to_json(), dict(tensor.to("cpu").tensors), tensor.shape)
    spec, tensors, shape = share(described, source)
    return QuantTensor(QuantSpec.from_json(spec), tensors, shape)


class TreeSum:
    """Adds up the sums of the runs, in order, along a binary tree; holds one sum per level."""

    def __init__(self) -> None:
        self._levels: list[tuple[int, Tensor | None]] = []

    def push(self, value: Tensor | None) -> None:
        """Take the sum of the next run, which is the tree's from now on; None where it has none."""
        level = 0
        while self._levels and self._levels[-1][0] == level:
            before = self._levels.pop()[1]
            value = _plus(before, value)
            level += 1
        self._levels.append((level, value))

    def total(self) -> Tensor | None:
        """The sum of all."""
        result: Tensor | None = None
        for _, value in reversed(self._levels):
            result = _plus(value, result)
        return result


def _plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)
