"""LLM.int8(): each output row of the weight as int8 times its absolute maximum (arXiv:2208.07339)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.core import Activation, Grouping, IntCode, QuantSpec, QuantTensor, Scale
from lowbit.errors import PlanError

# The decimal that bitsandbytes writes for 1/127; the bits of a dequantized weight depend on it.
INV_127 = 7.874015718698502e-3


def int8_spec(threshold: float = 6.0) -> QuantSpec:
    """int8 rows with fp32 absolute maxima; activations int8 per token, columns that reach `threshold` in 16 bits."""
    return QuantSpec(
        code=IntCode(8, signed=True),
        scale=Scale(torch.float32, multiplier=INV_127),
        grouping=Grouping.per_channel(),
        activation=Activation("int8", threshold),
        dtype=torch.float32,
    )


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
