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

from lowbit.algorithms.factor import full_precision
from lowbit.core import IntCode, QuantSpec, QuantTensor, pack, reference, unpack
from lowbit.errors import PlanError

_INSIDE = 0.4  # of a step: the latent weight starts where it rounds to the given code
_LEAST_HALF = 2.0**-24  # fp16 has its subnormal numbers on every device; of other dtypes they may count as 0


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
        # The multiplier comes last, as in the reference: on the way scales are what is stored.
        scale = self._usable(own["scales"]).float()
        self.first_scale: Tensor = scale
        zero = self._zeros(own, tensor.shape)
        self._others = {name: own[name] for name in spec.activation.tensors()}
        latent = self._units(weight.float() / spec.scale.multiplier, scale, zero)
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
            spread = functional.one_hot(self.groups, values.shape[1]).to(values.dtype).t()
            with torch.autocast(values.device.type, enabled=False), full_precision():
                return values @ spread
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

    def _usable(self, scale: Tensor) -> Tensor:
        """In the stored dtype; what that holds as 0 or not at all becomes the next number that can be divided by."""
        limits = torch.finfo(self.spec.scale.dtype)
        least = _LEAST_HALF if self.spec.scale.dtype == torch.float16 else limits.smallest_normal
        stored = scale.clamp(-limits.max, limits.max).to(self.spec.scale.dtype)
        return torch.where(stored.abs() < least, torch.copysign(torch.full_like(stored, least), stored), stored)

    def _stored(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both as they are stored; integer zeros not packed yet."""
        scale = self._usable(scale)
        if zero is None or self.spec.zero is None:
            return scale, None
        if self.spec.zero.kind == "integer":
            return scale, zero.round().clamp(0, (1 << self.spec.zero.bits) - 1).to(torch.int16)
        return scale, zero.to(self.spec.zero.dtype)

    def _latent_grid(self) -> tuple[Tensor, Tensor | None]:
        return self.first_scale * torch.exp(self.stretch), self.first_zero if self.zero is None else self.zero

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points as they would be stored, ``fp32 [out, groups]`` each, with gradients."""
        scale, zero = self._latent_grid()
        stored, stored_zero = self._stored(scale.detach(), None if zero is None else zero.detach())
        if zero is None or stored_zero is None:
            return _passing(scale, stored.float()), None
        return _passing(scale, stored.float()), _passing(zero, stored_zero.float())

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
        return _passing(latent, latent.detach().round()).clamp(self.code.low, self.code.high)

    def forward(self) -> Tensor:
        """The dense weight, ``fp32 [out, in]``."""
        scale, zero = self.grid()
        codes = self.codes(scale, zero)
        steps = self._spread(scale)
        if zero is None:
            values = codes * steps
        elif self._additive:
            values = codes * steps + self._spread(zero)
        else:
            values = (codes - self._spread(zero)) * steps
        return values if self.spec.scale.multiplier == 1.0 else values * self.spec.scale.multiplier

    @torch.no_grad()
    def finish(self) -> QuantTensor:
        """What was learned, as it is stored."""
        codes = self.codes(*self.grid()).to(torch.int16)
        scale, zero = self._stored(*self._latent_grid())
        dtype = self.spec.tensors(self.shape)["codes"][1]
        tensors = {
            "codes": codes.to(dtype).contiguous() if self.spec.bits == 8 else pack(codes, self.spec.bits),
            "scales": scale,
            **self._others,
        }
        if zero is not None and self.spec.zero is not None:
            tensors["zeros"] = pack(zero, self.spec.zero.bits) if self.spec.zero.kind == "integer" else zero
        if self.spec.grouping.permuted:
            tensors["group_index"] = self.groups.to(torch.int32)
        return QuantTensor(self.spec, tensors, self.shape).validate()


def _passing(value: Tensor, stored: Tensor) -> Tensor:
    """`stored` to the bit, with the gradient of `value`."""
    return stored + (value - value.detach())
