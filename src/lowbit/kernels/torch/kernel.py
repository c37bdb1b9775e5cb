"""The kernel that is always there: plain torch on any device, the weight as it came from the wire.

The weight stays packed; while a layer runs, one dense copy of that layer's weight exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.core import QuantSpec, QuantTensor, reference
from lowbit.core.rows import dequantize_in_strips
from lowbit.core.spec import TensorLayout
from lowbit.kernels.registry import Kernel, Problem


class TorchKernel(Kernel):
    """:mod:`lowbit.core.reference`, behind the interface of a kernel."""

    name: ClassVar[str] = "torch"
    devices: ClassVar[tuple[str, ...]] = ()

    def refusal(self, problem: Problem) -> str | None:
        return None

    def layout(self, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        return spec.tensors(shape)

    def prepare(self, tensor: QuantTensor) -> dict[str, Tensor]:
        return dict(tensor.tensors)

    def restore(self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantTensor:
        return QuantTensor(spec, dict(tensors), shape)

    def apply(
        self,
        inputs: Tensor,
        spec: QuantSpec,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        if spec.activation.kind == "int8":
            return reference.linear(inputs, spec, tensors, shape, bias)
        weight = dequantize_in_strips(spec, tensors, shape, inputs.dtype)
        return reference.multiply(inputs, weight, spec, tensors, bias)

    def dequantize(
        self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        return dequantize_in_strips(spec, tensors, shape, dtype)
