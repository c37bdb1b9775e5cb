"""LLM.int8(): each output row of the weight as int8 times its absolute maximum (arXiv:2208.07339)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.core import QuantSpec, QuantTensor, int8_spec
from lowbit.errors import PlanError


class Int8Rows(Algorithm):
    """``round(W * 127 / absmax)`` per row, from W rounded to fp16, as bitsandbytes does."""

    name: ClassVar[str] = "int8"

    def supports(self, spec: QuantSpec) -> bool:
        return spec == int8_spec(spec.activation.threshold)

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has values that fp16 can't hold.
        """
        half = weight.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise PlanError("int8 rows are made from fp16, and this weight has values that fp16 can't hold")
        absmax = half.abs().amax(dim=1).float()
        reciprocal = torch.where(absmax > 0, 127.0 / absmax, 0.0)
        codes = torch.round(half * reciprocal.unsqueeze(1)).to(torch.int8)
        tensors = {"codes": codes, "scales": absmax.unsqueeze(1)}
        return QuantTensor(spec, tensors, (weight.shape[0], weight.shape[1])).validate()
