"""Quantized weights whose codes, scales and zero points can be learned by gradient descent.

A latent weight in units of the first scale, ``base + offset``, is divided by the scale of the moment, rounded, clamped
and multiplied again. Gradients pass the rounding as if it were not there (straight-through, arXiv:1308.3432); what the
clamping cuts off has none. Scales and real zero points are rounded to their stored dtypes on the way, so that what is
optimized is what will be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.core import IntCode, QuantSpec, QuantTensor, pack, reference, unpack
from lowbit.errors import PlanError

_INSIDE = 0.4  # of half a step: the latent weight starts where it rounds to the given code


def can_learn(spec: QuantSpec) -> bool:
    """Whether :class:`LearnedWeight` takes weights of this spec."""
    second = [spec.scale.second, spec.zero.second if spec.zero else None]
    plain = isinstance(spec.code, IntCode) and second == [None, None] and spec.scale.stored
    return plain and spec.grouping.rows == 1 and not spec.grouping.linear and spec.rounding == "once"


class LearnedWeight(nn.Module):
    """A quantized weight ``[out, in]`` as a function of parameters.

    Args:
        weight: ``[out, in]``, dense; its place within each step is where learning starts.
        tensor: the quantized weight to start from.
        learn_zero: whether zero points may move; those of symmetric weights don't.
        bound: how far from `weight` the latent weight may move, in steps; None for anywhere (SignRound: 0.5).

    Attributes:
        offset: ``fp32 [out, in]``, steps.
        stretch: ``fp32 [out, groups]``, the logarithm of the scale relative to the first one.
        zero: ``fp32 [out, groups]``, or None.
    """

    def __init__(self, weight: Tensor, tensor: QuantTensor, *, learn_zero: bool = True, bound: float | None = None):
        super().__init__()
        spec = tensor.spec
        if not can_learn(spec) or not isinstance(spec.code, IntCode):
            raise PlanError(f"codes of '{spec}' can't be learned; integers with groups along rows can")
        self.spec, self.shape, self.bound, self.code = spec, tensor.shape, bound, spec.code
        device = weight.device
        own = {name: value.to(device) for name, value in tensor.tensors.items()}
        codes = reference.decode_codes(spec, own, tensor.shape).float()
        size = spec.grouping.cols or tensor.shape[1]
        index = own.get("group_index")
        groups = torch.arange(tensor.shape[1], device=device) // size if index is None else index.long()
        self.groups: Tensor = groups
        scale = own["scales"].float() * spec.scale.multiplier
        self.first_scale: Tensor = scale
        zero = self._zeros(own, tensor.shape)
        latent = self._units(weight.float(), scale, zero)
        base = codes + (latent - codes).clamp(-_INSIDE, _INSIDE)
        self.base: Tensor = base
        self.first_zero: Tensor | None = zero
        self.offset = nn.Parameter(torch.zeros_like(base))
        self.stretch = nn.Parameter(torch.zeros_like(scale))
        self.zero = nn.Parameter(zero.clone()) if learn_zero and spec.zero is not None and zero is not None else None

    def _zeros(self, own: dict[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
        if self.spec.zero is None:
            return None
        counts = self.spec.grouping.counts(shape)
        if self.spec.zero.kind == "integer":
            return unpack(own["zeros"], self.spec.zero.bits, counts[-1]).float()
        return own["zeros"].float().view(counts)

    def _spread(self, values: Tensor) -> Tensor:
        """``[out, groups]`` -> ``[out, in]``; without indexing, whose gradients have no fixed order of addition."""
        size = self.spec.grouping.cols or self.shape[1]
        if self.spec.grouping.permuted:
            return values @ functional.one_hot(self.groups, values.shape[1]).to(values.dtype).t()
        return values.repeat_interleave(size, dim=1)[:, : self.shape[1]]

    @property
    def _additive(self) -> bool:
        return self.spec.zero is not None and self.spec.zero.kind == "additive"

    def _units(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Where a weight lies on the grid, as an unrounded code."""
        steps = self._spread(scale)
        if zero is None:
            return weight / steps
        return (weight - self._spread(zero)) / steps if self._additive else weight / steps + self._spread(zero)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points as they would be stored, ``[out, groups]`` each, with gradients."""
        scale = self.first_scale * torch.exp(self.stretch)
        stored = (scale / self.spec.scale.multiplier).to(self.spec.scale.dtype)
        least = torch.finfo(self.spec.scale.dtype).smallest_normal
        stored = torch.where(stored.abs() < least, torch.copysign(torch.full_like(stored, least), scale), stored)
        scale = scale + (stored.float() * self.spec.scale.multiplier - scale).detach()
        zero = self.first_zero if self.zero is None else self.zero
        if zero is None or self.spec.zero is None:
            return scale, None
        if self.spec.zero.kind == "integer":
            rounded = zero.round().clamp(0, (1 << self.spec.zero.bits) - 1)
        else:
            rounded = zero.to(self.spec.zero.dtype).float()
        return scale, zero + (rounded - zero).detach()

    def codes(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Rounded, ``fp32 [out, in]``, with gradients."""
        offset = self.offset if self.bound is None else self.offset.clamp(-self.bound, self.bound)
        latent, ratio = self.base + offset, self._spread(self.first_scale / scale)
        if zero is None or self.first_zero is None:
            latent = latent * ratio
        elif self._additive:
            latent = latent * ratio + self._spread((self.first_zero - zero) / scale)
        else:
            latent = (latent - self._spread(self.first_zero)) * ratio + self._spread(zero)
        rounded = latent + (latent.round() - latent).detach()
        return rounded.clamp(self.code.low, self.code.high)

    def forward(self) -> Tensor:
        """The dense weight, ``fp32 [out, in]``."""
        scale, zero = self.grid()
        codes = self.codes(scale, zero)
        steps = self._spread(scale)
        if zero is None:
            return codes * steps
        if self._additive:
            return codes * steps + self._spread(zero)
        return (codes - self._spread(zero)) * steps

    @torch.no_grad()
    def finish(self) -> QuantTensor:
        """What was learned, as it is stored."""
        scale, zero = self.grid()
        codes = self.codes(scale, zero).round().to(torch.int16)
        layout = self.spec.tensors(self.shape)
        dtype = layout["codes"][1]
        tensors = {
            "codes": codes.to(dtype).contiguous() if self.spec.bits == 8 else pack(codes, self.spec.bits),
            "scales": (scale / self.spec.scale.multiplier).to(self.spec.scale.dtype),
        }
        if zero is not None and self.spec.zero is not None:
            integer = self.spec.zero.kind == "integer"
            whole = zero.round().to(torch.int16)
            tensors["zeros"] = pack(whole, self.spec.zero.bits) if integer else zero.to(self.spec.zero.dtype)
        if self.spec.grouping.permuted:
            tensors["group_index"] = self.groups.to(torch.int32)
        return QuantTensor(self.spec, tensors, self.shape).validate()
