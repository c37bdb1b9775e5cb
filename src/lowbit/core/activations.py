"""What quantization of activations does to numbers: each value is replaced by the one that its code stands for.

A format whose own kernels multiply codes gives the same up to the order of sums: ``sum(q_x s_x q_w s_w)`` is
``s_x s_w sum(q_x q_w)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lowbit.core import dtypes
from lowbit.core.spec import Activation
from lowbit.core.tables import E2M1

# The midpoints between the magnitudes of E2M1, at which a value is rounded up; ties go to the even code.
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
    values = inputs.float() if policy.rounding == "once" else inputs
    if not policy.symmetric:
        least, most = _extreme(values, policy, "least").clamp(max=0), _extreme(values, policy, "most").clamp(min=0)
        scale = _positive((most - least) / (policy.divisor or high - low), policy)
        zero = low - torch.round(least / scale) if policy.reciprocal else torch.round(low - least / scale)
        return _round(inputs, scale, zero.clamp(low, high), policy)
    largest = _extreme(values.abs(), policy, "most")
    if policy.bound:
        largest = largest.clamp(max=policy.bound)
    if policy.scale_dtype == torch.float8_e8m0fnu:
        return _round(inputs, power_of_two_scale(largest, high), None, policy)
    scale = _positive(largest / (policy.divisor or high), policy)
    if policy.scale_dtype == torch.float8_e4m3fn:
        scale = _two_level_scale(scale, tensors["input_global_scale"])
    return _round(inputs, scale, None, policy)


def _extreme(values: Tensor, policy: Activation, which: Literal["least", "most"]) -> Tensor:
    reduce = torch.amin if which == "least" else torch.amax
    return reduce(values) if policy.per == "tensor" else reduce(values, dim=-1, keepdim=True)


def _positive(scale: Tensor, policy: Activation) -> Tensor:
    scale = scale.clamp(min=policy.floor or _TINY)
    # fp16 doesn't hold the floor itself.
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def power_of_two_scale(largest: Tensor, high: float, bump: float = 1.75) -> Tensor:
    """The scale of a group in the microscaling formats, fp32: a power of two.

    The exponent of the group's largest magnitude becomes that of `high`, the largest number there is; a magnitude of
    `bump` times a power of two or more is taken as the next one.
    """
    mantissa, exponent = torch.frexp(largest.float())
    exponent = exponent - 1 + (mantissa >= bump / 2).to(exponent.dtype) - (math.frexp(high)[1] - 1)
    return torch.exp2(exponent.clamp(-127, 127).float())


def _two_level_scale(scale: Tensor, shared: Tensor) -> Tensor:
    """The scale as e4m3 relative to a stored one, fp32."""
    coded = (scale.float() * shared).clamp(max=448).to(torch.float8_e4m3fn).float()
    return torch.where(coded == 0, 0.125, coded) / shared


def _round(inputs: Tensor, scale: Tensor, zero: Tensor | None, policy: Activation) -> Tensor:
    low, high = number_range(policy.number)
    wide = policy.scale_dtype in dtypes.FLOAT8S.values()  # these scales are fp32 when they are used
    work = inputs.dtype if policy.rounding == "each" and not wide else torch.float32
    scale = scale.to(work)
    values = inputs.to(work) * (1.0 / scale) if policy.reciprocal else inputs.to(work) / scale
    if zero is not None:
        values = (torch.round(values) if policy.reciprocal else values) + zero.to(work)
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
    return torch.tensor(E2M1[:8], dtype=values.dtype, device=values.device)[code].copysign(values)
