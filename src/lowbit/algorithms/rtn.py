"""Round-to-nearest: every integer spec, without calibration."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.algorithms.base import Algorithm
from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, pack
from lowbit.errors import PlanError


class RoundToNearest(Algorithm):
    """Spreads each group's range over the integer grid and rounds.

    Asymmetric: from the minimum to the maximum of the group, zero included. Symmetric: the scale is
    ``absmax / (2**(b-1) - 0.5)``, so that both ends of the two's complement range are reached; where the spec stores a
    zero point, it is the middle. A spec without a zero point is always symmetric.
    """

    name: ClassVar[str] = "rtn"

    def __init__(self, symmetric: bool = False) -> None:
        self.symmetric = symmetric

    def supports(self, spec: QuantSpec) -> bool:
        levels = [spec.scale.second, spec.zero.second if spec.zero else None]
        return isinstance(spec.code, IntCode) and not spec.grouping.permuted and levels == [None, None]

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values, or values too large for the scale's dtype.
        """
        if not isinstance(spec.code, IntCode):
            raise PlanError(f"round-to-nearest makes integer codes, not {spec.code}")
        shape = (weight.shape[0], weight.shape[1])
        groups = to_groups(weight.float(), spec.grouping)
        scale, zero = self._parameters(groups, spec, spec.code)
        steps = (scale.float() * spec.scale.multiplier).unsqueeze(-1)
        codes = _round(groups, steps, zero, spec).clamp(spec.code.low, spec.code.high)
        tensors = {
            "codes": _store_codes(from_groups(codes, spec.grouping, shape), spec),
            "scales": scale,
            **_store_zeros(zero, spec),
        }
        return QuantTensor(spec, tensors, shape).validate()

    def _parameters(self, groups: Tensor, spec: QuantSpec, code: IntCode) -> tuple[Tensor, Tensor | None]:
        """Scales in their stored dtype and zeros (fp32, None where the spec has none), one per group."""
        symmetric = self.symmetric or spec.zero is None
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if symmetric:
            step = torch.maximum(-low, high) / ((1 << code.bits - 1) - 0.5)
        else:
            step = (high - low) / (code.high - code.low)
        scale = _store_scale(step / spec.scale.multiplier, spec.scale.dtype)
        if spec.zero is None:
            return scale, None
        effective = scale.float() * spec.scale.multiplier
        middle = float(code.low + (1 << code.bits - 1))
        if spec.zero.kind == "additive":
            return scale, -middle * effective if symmetric else low - code.low * effective
        zero = torch.full_like(effective, middle) if symmetric else code.low - low / effective
        return scale, zero.round().clamp(code.low, code.high) if spec.zero.kind == "integer" else zero


def to_groups(weight: Tensor, grouping: Grouping) -> Tensor:
    """Lay the weights of each group side by side: ``[out, in]`` -> ``[*counts, weights per group]``, padded with 0."""
    if grouping.flat:
        flat = weight.reshape(-1)
        return functional.pad(flat, (0, -flat.numel() % grouping.cols)).view(-1, grouping.cols)
    if grouping.strided:
        flat = weight.reshape(-1)
        return functional.pad(flat, (0, -flat.numel() % grouping.cols)).view(grouping.cols, -1).t()
    rows, cols = grouping.rows or weight.shape[0], grouping.cols or weight.shape[1]
    padded = functional.pad(weight, (0, -weight.shape[1] % cols, 0, -weight.shape[0] % rows))
    tiles = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, cols))
    return tiles.transpose(1, 2).flatten(2)


def from_groups(groups: Tensor, grouping: Grouping, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_groups`; drops the padding."""
    if grouping.flat:
        return groups.reshape(-1)[: shape[0] * shape[1]].view(shape)
    if grouping.strided:
        return groups.t().reshape(-1)[: shape[0] * shape[1]].view(shape)
    rows, cols = grouping.rows or shape[0], grouping.cols or shape[1]
    tiles = groups.unflatten(2, (rows, cols)).transpose(1, 2)
    return tiles.flatten(0, 1).flatten(1)[: shape[0], : shape[1]]


def _round(groups: Tensor, steps: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    if zero is None or spec.zero is None:
        return torch.round(groups / steps)
    stored = zero.to(spec.zero.dtype).float() if spec.zero.kind != "integer" else zero
    if spec.zero.kind == "additive":
        return torch.round((groups - stored.unsqueeze(-1)) / steps)
    if spec.zero.kind == "float":
        return torch.round(groups / steps + stored.unsqueeze(-1))
    return torch.round(groups / steps) + stored.unsqueeze(-1)


def _store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    if not bool(torch.isfinite(scale).all()):
        raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")
    if bool((scale > limits.max).any()):
        raise PlanError(f"a scale of {float(scale.max()):g} is more than {dtype} holds ({limits.max:g})")
    stored = scale.to(dtype)
    # A group of zeros has no scale of its own, and one that rounds to 0 would divide by it: any other will do.
    return torch.where(stored == 0, torch.where(scale == 0, 1.0, limits.smallest_normal).to(dtype), stored)


def _store_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    integers = codes.to(torch.int16)
    if spec.bits == 8:
        return integers.to(spec.tensors((1, 1))["codes"][1]).contiguous()
    return pack(integers.reshape(-1) if spec.grouping.flat else integers, spec.bits)


def _store_zeros(zero: Tensor | None, spec: QuantSpec) -> dict[str, Tensor]:
    if zero is None or spec.zero is None:
        return {}
    if spec.zero.kind == "integer":
        return {"zeros": pack(zero.to(torch.int16), spec.zero.bits)}
    return {"zeros": zero.to(spec.zero.dtype)}
