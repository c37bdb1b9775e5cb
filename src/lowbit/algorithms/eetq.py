"""Int8 rows as EETQ quantizes them, with the rounding of C."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.affine import require_finite
from lowbit.algorithms.base import Algorithm
from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor
from lowbit.errors import PlanError


class HalfAwayRows(Algorithm):
    """``round(W / scale)`` with ``scale = absmax / 128`` per row; halves are rounded away from zero.

    Codes are made with the fp32 scale, before it is rounded to fp16. In a row of zeros every code is 127 and the scale
    0, which is what comparisons with NaN give in C (FasterTransformer's ``symmetric_quantize``).
    """

    name: ClassVar[str] = "eetq"

    def supports(self, spec: QuantSpec) -> bool:
        rows = spec.grouping == Grouping.per_channel() and spec.zero is None
        return spec.code == IntCode(8, signed=True) and rows and spec.scale.second is None

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values, or a scale is more than its dtype holds.
        """
        require_finite(weight)
        values = weight.float()
        scales = values.abs().amax(1, keepdim=True) / 128
        stored = scales.to(spec.scale.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise PlanError(f"a scale of {float(scales.max()):g} is more than {spec.scale.dtype} holds")
        quotients = (values / scales).double()  # in which adding a half is exact
        rounded = (quotients.abs() + 0.5).floor().copysign(quotients).clamp(-128, 127)
        codes = torch.where(scales == 0, 127.0, rounded).to(torch.int8)
        return QuantTensor(spec, {"codes": codes, "scales": stored}, (weight.shape[0], weight.shape[1])).validate()
