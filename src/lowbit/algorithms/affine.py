"""Integers as torchao rounds them: scales in the weight's own dtype, and products with their reciprocals."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.rtn import from_groups, to_groups
from lowbit.core import IntCode, QuantSpec, QuantTensor, pack
from lowbit.errors import PlanError

Mapping = Literal["symmetric", "symmetric_no_clipping_err", "asymmetric"]
_ROUNDS = 20
_CONVERGED = 1e-5
_INT4_MIDDLE = 8
_INT4_LEAST_RANGE = 1e-6


class AffineIntegers(Algorithm):
    """``round(W * (1 / scale)) + zero``, with the operations of torchao's intx and int8 tensors.

    Args:
        mapping: ``symmetric``: ``scale = absmax / (range / 2)``; ``symmetric_no_clipping_err``: so that neither the
            minimum nor the maximum is clipped; ``asymmetric``: from the minimum to the maximum, zero included.
        reduced: whether codes of 8 bits keep to 7 (CPUs without VNNI overflow else).
        fitted: whether the scale is chosen by least squares instead (torchao's ``hqq_scale_only``).
        floor: the least scale; 0 for the least normal number of the weight's dtype.
    """

    name: ClassVar[str] = "affine"

    def __init__(
        self, mapping: Mapping = "symmetric", *, reduced: bool = False, fitted: bool = False, floor: float = 0.0
    ) -> None:
        self.mapping, self.reduced, self.fitted, self.floor = mapping, reduced, fitted, floor

    def supports(self, spec: QuantSpec) -> bool:
        levels = [spec.scale.second, spec.zero.second if spec.zero else None]
        plain = levels == [None, None] and spec.scale.multiplier == 1.0 and spec.scale.stored
        grouped = not (spec.grouping.permuted or spec.grouping.linear)
        return isinstance(spec.code, IntCode) and plain and grouped and spec.code.signed == (spec.zero is None)

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values.
        """
        require_finite(weight)
        low, high = self._range(spec.bits)
        groups = to_groups(weight, spec.grouping)
        codes: Tensor | None = None
        if self.fitted:
            codes, fitted = _fit_scales(groups.float(), low, high)
            scales, zeros = fitted.to(weight.dtype), torch.zeros_like(fitted)
        else:
            scales, zeros = self._parameters(groups, low, high)
        stored = scales.to(spec.scale.dtype)
        if codes is None or stored.dtype != weight.dtype:
            codes = torch.round(groups * (1.0 / stored).unsqueeze(-1)) + zeros.to(torch.int8).unsqueeze(-1)
            codes = codes.clamp(low, high)
        shape = (weight.shape[0], weight.shape[1])
        integers = from_groups(codes.to(torch.int16), spec.grouping, shape)
        return QuantTensor(spec, {**_store(integers, zeros, spec), "scales": stored}, shape).validate()

    def _range(self, bits: int) -> tuple[int, int]:
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        return (low // 2, high // 2) if self.reduced else (low, high)

    def _parameters(self, groups: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Scales and (whole, signed) zero points, one per group, in the weight's dtype."""
        least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        floor = self.floor or torch.finfo(groups.dtype).smallest_normal
        if self.mapping == "asymmetric":
            scales = ((most - least) / float(high - low)).clamp(min=floor)
            return scales, (low - torch.round(least / scales)).clamp(low, high)
        if self.mapping == "symmetric":
            scales = torch.maximum(-least, most) / (float(high - low) / 2)
        else:
            scales = torch.maximum(least / float(low), most / float(high))
        return scales.clamp(min=floor), torch.zeros_like(scales)


class Int4Additive(Algorithm):
    """Integers from -8 to 7 from the minimum to the maximum of a group, with the value of the code 0 beside the scale.

    The arithmetic is in fp32, and scales and zeros are rounded to the weight's dtype after codes were made with them
    (FBGEMM's ``int4_row_quantize_zp``, which torchao's ``Int4Tensor`` calls).
    """

    name: ClassVar[str] = "int4-additive"

    def supports(self, spec: QuantSpec) -> bool:
        zero = spec.zero is not None and spec.zero.kind == "additive" and spec.zero.second is None
        return spec.code == IntCode(4, signed=True) and zero and spec.scale.second is None

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values, or the spec is another.
        """
        if spec.zero is None or not self.supports(spec):
            raise PlanError(f"this makes signed 4-bit integers with additive zeros, not '{spec}'")
        require_finite(weight)
        groups = to_groups(weight.float(), spec.grouping)
        least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = (most - least).clamp(min=_INT4_LEAST_RANGE) / 15
        zeros = least + scales * _INT4_MIDDLE
        codes = ((groups - least) / scales).round().clamp(0, 15) - _INT4_MIDDLE
        shape = (weight.shape[0], weight.shape[1])
        tensors = {
            "codes": pack(from_groups(codes.to(torch.int16), spec.grouping, shape), 4),
            "scales": scales.squeeze(-1).to(spec.scale.dtype),
            "zeros": zeros.squeeze(-1).to(spec.zero.dtype),
        }
        return QuantTensor(spec, tensors, shape).validate()


def require_finite(weight: Tensor) -> None:
    """Raise a PlanError where a weight holds NaN or infinite values."""
    if not bool(torch.isfinite(weight).all()):
        raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")


def _fit_scales(groups: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes and scales (fp32): rounding and least squares in turn, until no scale changes any more."""
    least = torch.finfo(torch.float32).eps
    scales = (groups.abs().amax(-1) / max(abs(low), abs(high))).clamp(min=least)
    before = scales
    for _ in range(_ROUNDS):
        codes = torch.round(groups / scales.unsqueeze(-1)).clamp(low, high)
        products, squares = (groups * codes).sum(-1), (codes * codes).sum(-1)
        scales = torch.where(squares > 0, products / squares, before).clamp(min=least).abs()
        if ((scales - before).abs() / before.clamp(min=least)).max() < _CONVERGED:
            break
        before = scales
    return torch.round(groups / scales.unsqueeze(-1)).clamp(low, high), scales


def _store(integers: Tensor, zeros: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Codes, and zeros where the spec has them, from signed integers."""
    if spec.zero is None:
        return {"codes": integers.to(torch.int8) if spec.bits == 8 else pack(integers, spec.bits)}
    middle = 1 << spec.bits - 1
    return {"codes": pack(integers + middle, spec.bits), "zeros": pack(zeros.to(torch.int16) + middle, spec.bits)}
