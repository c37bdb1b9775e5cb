"""What quantization of activations does to numbers: each value is replaced by the one that its code stands for.

A format whose own kernels multiply codes gives the same up to the order of sums: ``sum(q_x s_x q_w s_w)`` is
``s_x s_w sum(q_x q_w)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lowbit.core import dtypes
from lowbit.core.spec import Activation

# The magnitudes of E2M1, and the midpoints between them at which a value is rounded up; ties go to the even code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_UP = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_TINY = 1e-30


def round_inputs(inputs: Tensor, policy: Activation, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inputs ``[..., in]`` as `policy` (``dynamic`` or ``static``) rounds them, in their own dtype.

    Args:
        tensors: those of the weight, which hold the scales of a static policy.
    """
    if policy.kind == "static":
        scale = tensors["input_scale"]
        zero = None if policy.symmetric else tensors["input_zero"]
        return _round(inputs, scale, zero, policy)
    if policy.per == "group":
        groups = inputs.unflatten(-1, (-1, policy.size))
        return _round_dynamic(groups, policy, tensors).flatten(-2)
    return _round_dynamic(inputs, policy, tensors)


def round_outputs(outputs: Tensor, policy: Activation, tensors: Mapping[str, Tensor]) -> Tensor:
    """The outputs of a layer, rounded by the stored scale where the policy says so."""
    return _round(outputs, tensors["output_scale"], None, policy) if policy.outputs else outputs


def _round_dynamic(inputs: Tensor, policy: Activation, tensors: Mapping[str, Tensor]) -> Tensor:
    low, high = number_range(policy.number)
    values = inputs if policy.rounding == "each" else inputs.float()
    if not policy.symmetric:
        least, most = _extreme(values, policy, "least").clamp(max=0), _extreme(values, policy, "most").clamp(min=0)
        scale = ((most - least) / (policy.divisor or high - low)).clamp(min=policy.floor or _TINY)
        return _round(inputs, scale, (low - torch.round(least / scale)).clamp(low, high), policy)
    largest = _extreme(values.abs(), policy, "most")
    if policy.bound:
        largest = largest.clamp(max=policy.bound)
    scale = (largest / (policy.divisor or high)).clamp(min=policy.floor or _TINY)
    return _round(inputs, _stored_scale(scale, policy, tensors), None, policy)


def _extreme(values: Tensor, policy: Activation, which: Literal["least", "most"]) -> Tensor:
    reduce = torch.amin if which == "least" else torch.amax
    return reduce(values) if policy.per == "tensor" else reduce(values, dim=-1, keepdim=True)


def _stored_scale(scale: Tensor, policy: Activation, tensors: Mapping[str, Tensor]) -> Tensor:
    """A dynamic scale as its dtype holds it."""
    if policy.scale_dtype == torch.float8_e4m3fn:
        shared = tensors["input_global_scale"].to(scale.dtype)
        return (scale * shared).clamp(max=448).to(torch.float8_e4m3fn).to(scale.dtype) / shared
    if policy.scale_dtype == torch.float8_e8m0fnu:
        return torch.exp2(torch.floor(torch.log2(scale)))
    return scale


def _round(inputs: Tensor, scale: Tensor, zero: Tensor | None, policy: Activation) -> Tensor:
    low, high = number_range(policy.number)
    work = inputs.dtype if policy.rounding == "each" else torch.float32
    scale = scale.to(work)
    values = inputs.to(work) / scale
    if zero is not None:
        values = values + zero.to(work)
    values = round_to(values.clamp(low, high) if policy.number.startswith("float") else values, policy.number)
    values = values.clamp(low, high)
    if zero is not None:
        values = values - zero.to(work)
    return (values * scale).to(inputs.dtype)


def number_range(number: str) -> tuple[float, float]:
    """The least and the largest value of a number that activations are rounded to."""
    if number.startswith("int"):
        half = 1 << int(number[3:]) - 1
        return float(-half), float(half - 1)
    if number == "float4_e2m1":
        return -6.0, 6.0
    limits = torch.finfo(dtypes.FLOAT8S[number])
    return limits.min, limits.max


def round_to(values: Tensor, number: str) -> Tensor:
    """The nearest value of `number`, ties to even, in the dtype of `values`; integers are not clamped."""
    if number.startswith("int"):
        return torch.round(values)
    if number == "float4_e2m1":
        return _round_e2m1(values)
    return values.to(dtypes.FLOAT8S[number]).to(values.dtype)


def _round_e2m1(values: Tensor) -> Tensor:
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.int64)
    for middle, at_tie in _E2M1_UP:
        code += (magnitude >= middle) if at_tie else (magnitude > middle)
    return torch.tensor(_E2M1, dtype=values.dtype, device=values.device)[code].copysign(values)
