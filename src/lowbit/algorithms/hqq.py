"""Half-quadratic quantization (HQQ, mobiusml.github.io/hqq_blog): zero points that make the p-norm of the error small.

No data is needed. The order of operations is hqq's, so that on a CPU codes, scales and zero points come out the same
to the bit; on a GPU hqq works in fp16, here it is fp32 everywhere.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, pack
from lowbit.errors import PlanError

_STEPS = 20
_NORM = 0.7
_BETA = 10.0
_NARROW = 1e-4  # a group whose range is at most this keeps its numbers as they are
_STEEPEST = 2e4  # codes per unit; keeps the scale, its reciprocal, inside of fp16


class HalfQuadratic(Algorithm):
    """Scales from the range of each group; zero points from up to 20 proximal steps, until the error grows.

    A step rounds with the present zero point, takes the part of the error that a soft threshold (p = 0.7) lets through
    for outliers, and sets the zero point to the mean of what is left.

    Args:
        round_zero: whether to start from whole zero points; None for hqq's choice, which is to do so for 4 bits.
    """

    name: ClassVar[str] = "hqq"

    def __init__(self, round_zero: bool | None = None) -> None:
        self.round_zero = round_zero

    def supports(self, spec: QuantSpec) -> bool:
        return (
            isinstance(spec.code, IntCode)
            and not spec.code.signed
            and spec.zero is not None
            and spec.zero.kind == "float"
            and spec.rounding == "each"
            and not spec.grouping.permuted
            and (spec.scale.second, spec.zero.second) == (None, None)
            and _axis(spec.grouping) is not None
        )

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values, groups don't divide it, or a zero point is more than its
                dtype holds.
        """
        axis = _axis(spec.grouping)
        if not self.supports(spec) or axis is None or spec.zero is None:
            raise PlanError(f"hqq makes unsigned integers with real zero points, not '{spec}'")
        shape = (weight.shape[0], weight.shape[1])
        groups = _to_groups(weight.float(), spec.grouping, axis)
        rounded = spec.bits == 4 if self.round_zero is None else self.round_zero
        per_unit, zero = _start(groups, axis, (1 << spec.bits) - 1, rounded)
        if not bool((torch.isfinite(zero) & (per_unit > 0)).all()):
            raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")
        zero = _improve(groups, per_unit, zero, axis, (1 << spec.bits) - 1)
        codes = torch.round(groups * per_unit + zero).clamp_(0, (1 << spec.bits) - 1).to(torch.uint8).reshape(shape)
        stored = zero.to(spec.zero.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise PlanError(f"a zero point of {float(zero.abs().max()):g} is more than {spec.zero.dtype} holds")
        counts = spec.grouping.counts(shape)
        tensors = {
            "codes": _store(codes, spec),
            "scales": (1.0 / per_unit).to(spec.scale.dtype).reshape(counts),
            "zeros": stored.reshape(counts),
        }
        return QuantTensor(spec, tensors, shape).validate()


def _axis(grouping: Grouping) -> int | None:
    """Over which axis of the grouped weight a group lies; None for tiles that hqq doesn't have."""
    if grouping.strided or grouping == Grouping(rows=0, cols=1):
        return 0
    return 1 if grouping.rows == 1 else None


def _to_groups(weight: Tensor, grouping: Grouping, axis: int) -> Tensor:
    size = weight.shape[0] if grouping.rows == 0 else grouping.cols or weight.shape[1]
    if weight.numel() % size or (axis == 1 and not grouping.flat and weight.shape[1] % size):
        raise PlanError(f"groups of {size} don't divide {weight.shape[0]} x {weight.shape[1]}")
    return weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1)


def _start(groups: Tensor, axis: int, high: int, rounded: bool) -> tuple[Tensor, Tensor]:
    """Codes per unit of weight (the reciprocal of the scale) and zero points, from each group's range."""
    low = groups.amin(axis, keepdim=True)
    spread = groups.amax(axis, keepdim=True) - low
    per_unit = torch.where(spread.abs() <= _NARROW, 1.0, high / spread).clamp(max=_STEEPEST)
    zero = -low * per_unit
    return per_unit, torch.round(zero) if rounded else zero


def _improve(groups: Tensor, per_unit: Tensor, zero: Tensor, axis: int, high: int) -> Tensor:
    best: Tensor | None = None
    for _ in range(_STEPS):
        codes = torch.round(groups * per_unit + zero).clamp_(0, high)
        difference = groups - (codes - zero) / per_unit
        error = difference.abs().mean()
        zero = torch.mean(codes - (groups - _shrink(difference)) * per_unit, dim=axis, keepdim=True)
        if best is not None and not bool(error < best):
            break
        best = error
    return zero


def _shrink(difference: Tensor) -> Tensor:
    """The soft threshold of the p-norm."""
    size = difference.abs()
    size.sub_((1.0 / _BETA) * size.pow(_NORM - 1)).clamp_min_(0.0)
    return size.mul_(torch.sign(difference))


def _store(codes: Tensor, spec: QuantSpec) -> Tensor:
    if spec.bits == 8:
        return codes.contiguous()
    return pack(codes.reshape(-1) if spec.grouping.flat else codes, spec.bits)
