"""quanto's choice of scales: the range of each group, in the weight's own dtype.

The order of operations is optimum-quanto's (0.2.7, `AbsmaxOptimizer` and `MaxOptimizer`), so that codes, scales and
shifts come out the same to the bit.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.core import FloatCode, Grouping, IntCode, QuantSpec, QuantTensor, pack
from lowbit.errors import PlanError

_TINYGEMM_GROUP = 128


class WeightRange(Algorithm):
    """8 bits: the largest absolute value of a row. Fewer: from the least to the largest value of a group.

    All arithmetic is rounded to the weight's dtype. A group whose scale is 0 gets codes of 0; quanto divides by the
    scale there, which gives 0 for integers and NaN for float8.
    """

    name: ClassVar[str] = "quanto"

    def supports(self, spec: QuantSpec) -> bool:
        grouping = spec.grouping
        rows = grouping.rows == 1 and not grouping.linear and not grouping.permuted
        plain = rows and spec.scale.second is None and spec.scale.multiplier == 1.0 and spec.activation.kind == "none"
        if isinstance(spec.code, FloatCode):
            return plain and spec.bits == 8 and grouping == Grouping.per_channel()
        if not isinstance(spec.code, IntCode):
            return False
        if spec.code.signed:
            return plain and spec.bits == 8 and spec.zero is None and grouping == Grouping.per_channel()
        return plain and spec.bits < 8 and spec.zero is not None and spec.zero.kind == "additive"

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values, or groups don't divide its rows.
        """
        if not self.supports(spec):
            raise PlanError(f"quanto's ranges make other specs than '{spec}'")
        weight = weight.to(spec.dtype)
        if not bool(torch.isfinite(weight.abs().amax())):
            raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")
        tensors = _symmetric(weight, spec) if spec.bits == 8 else _affine(weight, spec)
        if not bool(torch.isfinite(tensors["scales"]).all()):
            raise PlanError(f"the range of a group is more than {spec.dtype} holds")
        return QuantTensor(spec, tensors, (weight.shape[0], weight.shape[1])).validate()


def _symmetric(weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    limits = torch.finfo(spec.code.dtype) if isinstance(spec.code, FloatCode) else torch.iinfo(torch.int8)
    scale = weight.abs().amax(dim=1, keepdim=True) / limits.max
    codes = torch.where(scale == 0, 0.0, weight / scale)
    if not isinstance(spec.code, FloatCode):
        codes = torch.round(codes)
    codes = codes.clamp(limits.min, limits.max).to(spec.code.dtype if isinstance(spec.code, FloatCode) else torch.int8)
    return {"codes": codes, "scales": scale}


def _affine(weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    size, high = spec.grouping.cols or weight.shape[1], (1 << spec.bits) - 1
    if weight.shape[1] % size:
        raise PlanError(f"groups of {size} don't divide rows of {weight.shape[1]}")
    groups = weight.reshape(-1, size)
    low = groups.amin(1, keepdim=True)
    scale = (groups.amax(1, keepdim=True) - low) / high
    codes = torch.round(torch.where(scale == 0, 0.0, (groups - low) / scale)).clamp(0, high).to(torch.uint8)
    counts = spec.grouping.counts((weight.shape[0], weight.shape[1]))
    zeros = _as_kept(low, scale, spec, size)
    return {
        "codes": pack(codes.reshape(weight.shape), spec.bits),
        "scales": scale.reshape(counts),
        "zeros": zeros.reshape(counts),
    }


def _as_kept(low: Tensor, scale: Tensor, spec: QuantSpec, size: int) -> Tensor:
    """The shifts as quanto keeps them: its kernel for bfloat16 stores the middle of the range, which rounds twice."""
    if spec.bits != 4 or spec.dtype != torch.bfloat16 or size != _TINYGEMM_GROUP:
        return low
    half = 8 * scale
    return -(half - (low + half))
