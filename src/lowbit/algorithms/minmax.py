"""Round-to-nearest as compressed-tensors does it: in the weight's own dtype, for integers and every small float."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.rtn import from_groups, to_groups
from lowbit.core import FloatCode, IntCode, QuantSpec, QuantTensor, TableCode, pack
from lowbit.core.activations import power_of_two_scale, round_to
from lowbit.core.tables import E2M1, E2M3
from lowbit.errors import PlanError

_TABLES = {"e2m1": E2M1, "e2m3": E2M3}
_LEAST_CODED = 0.125  # what stands for scales that e4m3 rounds to 0


class MinMax(Algorithm):
    """Each group from its minimum to its maximum, zero included; symmetric where the spec has no zero points.

    Integers reach both ends of their range: ``scale = absmax / (2**b - 1) * 2``. Floats bring the absolute maximum to
    the largest number there is; with power-of-two scales, nearly. Every operation rounds to the weight's dtype.
    """

    name: ClassVar[str] = "minmax"

    def supports(self, spec: QuantSpec) -> bool:
        grouping, scale, second = spec.grouping, spec.scale, spec.scale.second
        if grouping.permuted or grouping.linear or not scale.stored or scale.multiplier != 1.0:
            return False
        if second is not None and (second.kind != "float8" or second.size or not second.divides or second.offset):
            return False
        if isinstance(spec.code, IntCode):
            signs = spec.code.signed == (spec.zero is None) and (spec.zero is None or spec.zero.kind == "integer")
            return signs and second is None and scale.dtype != torch.float8_e8m0fnu
        if isinstance(spec.code, TableCode):
            return spec.code.name in _TABLES and (second is not None or scale.dtype == torch.float8_e8m0fnu)
        return isinstance(spec.code, FloatCode) and spec.code.dtype == torch.float8_e4m3fn and second is None

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values, or the spec needs a calibration or another algorithm.
        """
        if not self.supports(spec):
            raise PlanError(f"{self.name} doesn't make '{spec}'")
        if spec.activation.tensors():
            raise PlanError(f"scales of activations that are stored with the weight need calibration: '{spec}'")
        if not bool(torch.isfinite(weight).all()):
            raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")
        shape = (weight.shape[0], weight.shape[1])
        groups = to_groups(weight, spec.grouping)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        tensors, scales, zeros = _parameters(low, high, spec)
        values = groups / scales.unsqueeze(-1)
        if zeros is not None:
            values = values + zeros.unsqueeze(-1)
        tensors["codes"] = _codes(from_groups(values, spec.grouping, shape), spec)
        return QuantTensor(spec, tensors, shape).validate()


def _parameters(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """What is stored; the scales to divide by, in the weight's dtype or fp32; and signed zero points or None."""
    largest, eps = torch.maximum(-low, high), torch.finfo(low.dtype).eps
    if isinstance(spec.code, TableCode):
        table = torch.tensor(_TABLES[spec.code.name], device=low.device)
        if spec.scale.second is not None:
            return _two_levels(largest, table)
        stored, scales = _powers_of_two(largest, spec)
        return {"scales": stored, "table": table}, scales, None
    if spec.scale.dtype == torch.float8_e8m0fnu:
        stored, scales = _powers_of_two(largest, spec)
        return {"scales": stored}, scales, None
    if isinstance(spec.code, FloatCode) or spec.zero is None:
        steps = torch.finfo(torch.float8_e4m3fn).max if isinstance(spec.code, FloatCode) else ((1 << spec.bits) - 1) / 2
        scales = largest / steps
        scales = _stored(torch.where(scales == 0, eps, scales), spec)
        return {"scales": scales}, scales.to(low.dtype), None
    half = 1 << spec.bits - 1
    scales = (high - low) / ((1 << spec.bits) - 1)
    zeros = torch.where(scales == 0, 0, torch.round((-half - low / scales).clamp(-half, half - 1)))
    scales = _stored(torch.where(scales == 0, eps, scales), spec)
    return {"scales": scales, "zeros": pack(zeros + half, spec.bits)}, scales.to(low.dtype), zeros


def _stored(scales: Tensor, spec: QuantSpec) -> Tensor:
    stored = scales.to(spec.scale.dtype)
    if bool((stored == 0).any()) or not bool(torch.isfinite(stored).all()):
        raise PlanError(f"a scale of {float(scales.max()):g} or {float(scales.min()):g} is more than the spec holds")
    return stored


def _powers_of_two(largest: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    high = {4: 6.0, 6: 7.5}.get(spec.bits, 448.0)
    scales = power_of_two_scale(largest, high, bump=1.9375 if spec.bits == 6 else 1.75).to(largest.dtype)
    scales = torch.where(scales == 0, 1, scales)  # fp16 holds none that are so small
    return scales.to(torch.float8_e8m0fnu), scales


def _two_levels(largest: Tensor, table: Tensor) -> tuple[dict[str, Tensor], Tensor, None]:
    """NVFP4: one scale for all brings the scales of the groups into the range of e4m3."""
    absmax = largest.amax().clamp(min=torch.finfo(largest.dtype).tiny)
    shared = (448.0 * 6.0 / absmax).nan_to_num(1.0, posinf=1.0).float().reshape(1)
    coded = (largest / 6.0 * shared).clamp(max=448.0).to(torch.float8_e4m3fn).float()
    coded = torch.where(coded == 0, _LEAST_CODED, coded)
    stored = {"scales": coded.to(torch.float8_e4m3fn), "super_scales": shared, "table": table}
    return stored, coded / shared, None


def _codes(values: Tensor, spec: QuantSpec) -> Tensor:
    if isinstance(spec.code, FloatCode):
        return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).contiguous()
    if isinstance(spec.code, IntCode):
        half = 1 << spec.bits - 1
        integers = torch.round(values.clamp(-half, half - 1)).to(torch.int16)
        if spec.bits == 8 and spec.code.signed:
            return integers.to(torch.int8).contiguous()
        return pack(integers if spec.code.signed else integers + half, spec.bits)
    return pack(_table_codes(values, spec.bits), spec.bits)


def _table_codes(values: Tensor, bits: int) -> Tensor:
    """The codes of E2M1 or E2M3: of a magnitude, ties to even, and the sign in the highest bit."""
    if bits == 4:
        magnitudes, rounded = E2M1[:8], round_to(values.clamp(-6, 6), "float4_e2m1").abs()
    else:
        magnitude = values.float().abs()
        steps = torch.exp2((torch.frexp(magnitude).exponent - 1).clamp(min=0).float() - 3)
        magnitudes, rounded = E2M3[:32], (torch.round(magnitude / steps) * steps).clamp(max=7.5)
    table = torch.tensor(magnitudes, device=values.device)
    return torch.bucketize(rounded.float(), table) | (values < 0).to(torch.int64) << bits - 1
