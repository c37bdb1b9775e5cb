"""Weights as FP8 numbers with scales that bring the largest value of a group to the largest number there is."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.affine import require_finite
from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.rtn import from_groups, to_groups
from lowbit.core import FloatCode, QuantSpec, QuantTensor
from lowbit.errors import PlanError


class ScaledFloat8(Algorithm):
    """``W / scale``, rounded to the nearest number, with ``scale = absmax / largest`` per group.

    A group of zeros, whose scale would be 0, gets the scale 1, or `floor`.

    Args:
        floor: the least scale; 0 for none.
        in_dtype: whether the quotient that becomes the scale is rounded to the weight's dtype (torchao).
    """

    name: ClassVar[str] = "float8"

    def __init__(self, *, floor: float = 0.0, in_dtype: bool = False) -> None:
        self.floor, self.in_dtype = floor, in_dtype

    def supports(self, spec: QuantSpec) -> bool:
        number = isinstance(spec.code, FloatCode) and spec.code.bits == 8
        plain = spec.scale.stored and spec.scale.second is None and spec.scale.multiplier == 1.0
        return number and plain and not (spec.grouping.permuted or spec.grouping.linear)

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values, or the spec is not of FP8 numbers.
        """
        if not isinstance(spec.code, FloatCode) or not self.supports(spec):
            raise PlanError(f"this makes FP8 numbers, not '{spec}'")
        require_finite(weight)
        number, shape = spec.code.dtype, (weight.shape[0], weight.shape[1])
        largest = torch.finfo(number).max
        groups = to_groups(weight, spec.grouping)
        scales = self._scales(groups.abs().amax(-1), largest).to(spec.scale.dtype)
        values = (groups.float() / scales.float().unsqueeze(-1)).clamp(-largest, largest)
        codes = from_groups(values, spec.grouping, shape).contiguous().to(number)
        return QuantTensor(spec, {"codes": codes, "scales": scales}, shape).validate()

    def _scales(self, absmax: Tensor, largest: float) -> Tensor:
        exact = absmax.float() / largest
        scales = (absmax / largest).float() if self.in_dtype else exact
        scales = torch.where(scales == 0, exact, scales)  # fp16 may not hold the quotient
        if self.floor:
            return scales.clamp(min=self.floor)
        return torch.where(scales == 0, 1.0, scales)
