"""Activation-aware weight quantization (AWQ, arXiv:2306.00978): scales for channels, and clipped ranges for groups.

Both searches measure the error of a layer's outputs without its inputs. Of inputs x, the mean squared output error of
``dW = Q - W`` is ``E |dW x|² = E tr(dW x xᵀ dWᵀ) = tr(dW H dWᵀ)`` with ``H = E x xᵀ``, since the trace is linear: H is
all that inputs contribute to it, however many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from lowbit.algorithms.affine import require_finite
from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.grid import Grid
from lowbit.algorithms.rtn import RoundToNearest, from_groups, to_groups
from lowbit.algorithms.statistics import HESSIAN, MAGNITUDES, Statistics
from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import PlanError

_LEAST_WEIGHT: Final = 1e-4  # added to a channel's weight magnitude, which is at most 1, before it divides
_WIDEST: Final = 1e4  # scales lie within this factor of 1; more of it would leave fp16's range
_ENDS: Final = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class ScaleSearch:
    """What :func:`search_scales` found.

    Attributes:
        scales: ``fp32 [in]``.
        before: the output error of rounding the weights as they are.
        after: of rounding them scaled.
        ratio: the exponent of the activations' magnitude; 0 where nothing is scaled.
        duo: whether the weights' magnitude divides.
    """

    scales: Tensor
    before: float
    after: float
    ratio: float
    duo: bool


class ActivationAware(Algorithm):
    """Clips the range of each group so that the layer's outputs stay close, and rounds to nearest.

    The other half of AWQ, scaling the channels that large activations meet, concerns several layers at once:
    :func:`search_scales` chooses the scales, :mod:`lowbit.calibration.equalize` applies them to a block beforehand.

    Args:
        symmetric: whether zero points stay in the middle of the range; so it is where a spec has none.
        clip: whether ranges are clipped at all.
        grid: how many steps the search takes from the whole range to half of it.
    """

    name: ClassVar[str] = "awq"
    needs = frozenset({HESSIAN, MAGNITUDES})

    def __init__(self, symmetric: bool = False, *, clip: bool = True, grid: int = 20) -> None:
        self.symmetric, self.clip, self.grid = symmetric, clip, grid
        self._rounding = RoundToNearest(symmetric)

    def supports(self, spec: QuantSpec) -> bool:
        grouping = spec.grouping
        return self._rounding.supports(spec) and grouping.rows == 1 and not grouping.linear and spec.scale.stored

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """Round to nearest: nothing is known of the inputs.

        Raises:
            PlanError: as :meth:`calibrated`.
        """
        return self.calibrated(weight, spec, Statistics())

    def calibrated(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantTensor:
        """See :meth:`Algorithm.calibrated`. Without a Hessian (an expert that saw no token) nothing is clipped.

        Raises:
            PlanError: the spec is not supported, or weight or Hessian have NaN or infinite values.
        """
        if not self.supports(spec):
            raise PlanError(f"awq makes integers with one level of scales, in groups along the inputs, not '{spec}'")
        require_finite(weight)
        if self.clip and statistics.hessian is not None:
            low, high = search_clip(weight, spec, statistics.hessian, grid=self.grid, symmetric=self.symmetric)
            weight = clip_groups(weight, spec, low, high)
        return self._rounding.quantize(weight, spec)


@torch.no_grad()
def search_scales(
    weights: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    hessians: Sequence[Tensor],
    magnitudes: Tensor,
    *,
    grid: int = 20,
    symmetric: bool = False,
    tie: Callable[[Tensor], Tensor] | None = None,
    parts: Sequence[float] | None = None,
) -> ScaleSearch:
    """Choose scales by which the input columns of all weights are multiplied (and their inputs divided).

    Tried are ``x^r`` (section 3.2) and ``x^r / w^(1 - r)`` (as AWQ's implementation does) for `grid` exponents r, with
    x the magnitude of a channel's activations and w that of its weights, relative to their group's largest. Leaving
    everything as it is is among them, so the error never grows.

    Args:
        weights: ``[out, in]`` each, floating point, on one device; quantized with the same scales.
        specs: one for each.
        hessians: ``[in, in]`` each, the mean of ``x xᵀ`` over the tokens that reach this weight.
        magnitudes: ``[in]``, the mean of ``|x|``.
        symmetric: as in :class:`ActivationAware`.
        tie: brings scales ``[in]`` to the nearest that can be applied, where some channels have to share theirs.
        parts: how much each weight's error counts; by default all the same.

    Raises:
        PlanError: there is no weight, or the statistics are not finite.
    """
    if not weights or not bool(torch.isfinite(magnitudes).all()):
        raise PlanError("scales are searched for one or more weights, with finite magnitudes of their inputs")
    dense, parts = [weight.float() for weight in weights], parts or [1.0] * len(weights)
    hessians = [hessian.to(dense[0].device, torch.float32) for hessian in hessians]
    grids = [Grid(spec, symmetric, dense[0].device) for spec in specs]

    def error(scales: Tensor) -> float:
        total = torch.zeros((), device=dense[0].device, dtype=torch.float64)
        for weight, hessian, levels, part in zip(dense, hessians, grids, parts, strict=True):
            total += part * output_error(round_trip(weight * scales, levels) / scales - weight, hessian)
        return float(total)

    before = error(torch.ones_like(dense[0][0]))
    best = ScaleSearch(torch.ones_like(dense[0][0]), before, before, 0.0, False)
    for scales, ratio, duo in _candidates(dense, specs, magnitudes.to(dense[0].device), grid):
        tied = scales if tie is None else tie(scales)
        found = error(tied)
        if found < best.after:
            best = ScaleSearch(tied, before, found, ratio, duo)
    return best


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """``tr(dW H dWᵀ)``, the mean squared error of the outputs, summed over them; fp64, of no dimensions."""
    return ((difference @ hessian) * difference).sum(dtype=torch.float64)


def round_trip(weight: Tensor, grid: Grid) -> Tensor:
    """``[out, in]`` rounded to nearest, from the minimum to the maximum of each group, and back; fp32."""
    groups = to_groups(weight, grid.spec.grouping)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    return from_groups(_rounded(groups, grid, low, high), grid.spec.grouping, (weight.shape[0], weight.shape[1]))


def _rounded(groups: Tensor, grid: Grid, low: Tensor, high: Tensor) -> Tensor:
    levels = grid.levels(grid.by_range(low, high))
    return grid.value(grid.nearest(groups, levels), levels)


def _candidates(
    weights: Sequence[Tensor], specs: Sequence[QuantSpec], magnitudes: Tensor, grid: int
) -> Iterator[tuple[Tensor, float, bool]]:
    activations = magnitudes.float().clamp(min=float(magnitudes.mean()) * _LEAST_WEIGHT).clamp(min=1e-12)
    relative = _relative_magnitudes(weights, specs) + _LEAST_WEIGHT
    for step in range(grid):
        ratio = step / grid
        if step:
            yield _centred(activations.pow(ratio)), ratio, False
        yield _centred(activations.pow(ratio) / relative.pow(1 - ratio)), ratio, True


def _relative_magnitudes(weights: Sequence[Tensor], specs: Sequence[QuantSpec]) -> Tensor:
    """``[in]``: the mean over all rows of ``|w| / max |w|``, the maximum being that of the weight's group."""
    total, rows = torch.zeros_like(weights[0][0]), 0
    for weight, spec in zip(weights, specs, strict=True):
        groups = to_groups(weight.abs(), spec.grouping)
        largest = groups.amax(-1, keepdim=True)
        relative = groups / torch.where(largest == 0, 1, largest)
        total += from_groups(relative, spec.grouping, (weight.shape[0], weight.shape[1])).sum(0)
        rows += weight.shape[0]
    return total / max(1, rows)


def _centred(scales: Tensor) -> Tensor:
    """Divided by the geometric mean of the least and the largest, and within :data:`_WIDEST` of 1."""
    return (scales / (scales.min() * scales.max()).sqrt()).clamp(1 / _WIDEST, _WIDEST)


@torch.no_grad()
def search_clip(
    weight: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    grid: int = 20,
    max_shrink: float = 0.5,
    *,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose the range of each group: what lies outside is clipped, and what lies inside has finer steps.

    The error that is made small is each group's own part of the outputs' error, ``dw H_g dwᵀ`` with the group's block
    of the Hessian. First both ends shrink together, then, where there is a zero point, each by itself.

    Args:
        weight: ``[out, in]``, floating point.
        spec: integers in groups along the inputs.
        hessian: ``[in, in]``.
        grid: how many steps there would be to a range of 0.
        max_shrink: the part of the range that is given up at most.
        symmetric: as in :class:`ActivationAware`.

    Returns:
        Low and high end, ``fp32 [out, groups]``.

    Raises:
        PlanError: the Hessian has another size, or is not finite.
    """
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]) or not bool(torch.isfinite(hessian).all()):
        size = weight.shape[1]
        raise PlanError(f"a finite Hessian of {size} x {size} is needed for the clip search, not {list(hessian.shape)}")
    groups = to_groups(weight.float(), spec.grouping)
    levels = Grid(spec, symmetric, weight.device)
    blocks = _diagonal_blocks(hessian.to(weight.device, torch.float32), groups.shape[-1])
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)

    def error(low: Tensor, high: Tensor) -> Tensor:
        difference = (_rounded(groups, levels, low, high) - groups).transpose(0, 1)  # [groups, out, size]
        return ((difference @ blocks) * difference).sum(-1, keepdim=True).transpose(0, 1)

    best = error(low, high)
    together = [1 - step / grid for step in range(1, int(max_shrink * grid) + 1)]
    alone = () if levels.symmetric else _ENDS
    for tried in ([(r, r) for r in together], [(r, 1.0) for r in alone], [(1.0, r) for r in alone]):
        least, most = low, high
        for lower, upper in tried:
            found = error(least * lower, most * upper)
            better, best = found < best, torch.minimum(best, found)
            low, high = torch.where(better, least * lower, low), torch.where(better, most * upper, high)
    return low.squeeze(-1), high.squeeze(-1)


def clip_groups(weight: Tensor, spec: QuantSpec, low: Tensor, high: Tensor) -> Tensor:
    """``[out, in]`` fp32 with each group clipped to its range ``[out, groups]``."""
    groups = to_groups(weight.float(), spec.grouping).clamp(low.unsqueeze(-1), high.unsqueeze(-1))
    return from_groups(groups, spec.grouping, (weight.shape[0], weight.shape[1]))


def _diagonal_blocks(hessian: Tensor, size: int) -> Tensor:
    """``[in, in]`` -> ``[groups, size, size]``; a shorter last block is padded with 0."""
    count = -(-hessian.shape[0] // size)
    blocks = hessian.new_zeros(count, size, size)
    for number in range(count):
        part = hessian[number * size : (number + 1) * size, number * size : (number + 1) * size]
        blocks[number, : part.shape[0], : part.shape[1]] = part
    return blocks
