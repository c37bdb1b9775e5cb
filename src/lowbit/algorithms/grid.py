"""The numbers that a group of weights can become, and the search for the scale and zero that serve it best.

Weights lie here with their columns first, ``[n, rows]``: the n columns of a group, and one group per row of the weight.
Whatever a spec stores is rounded to its dtype at once, so that an error that was measured is the error that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lowbit.algorithms.blockwise import table as named_table
from lowbit.core import IntCode, QuantSpec, TableCode
from lowbit.core.tables import E2M1, E2M3

_SHRINK: Final = tuple(1 - 0.025 * step for step in range(1, 25))
_POWERS: Final = (0.5, 2.0)  # of scales that are powers of two, which the range alone rounds either way
_ENDS: Final = (0.7, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2)
_REFITS: Final = 3
_TABLES: Final = {"e2m1": E2M1, "e2m3": E2M3}


@dataclass(frozen=True)
class Choice:
    """Scales and zeros of groups, fp32 ``[..., rows]``, as they come back from their stored dtypes.

    A zero is an integer, a real one, or an addend, as the spec says; 0 where the spec has none.
    """

    scale: Tensor
    zero: Tensor

    def of(self, index: int | Tensor | slice | tuple[slice, slice] | None) -> Choice:
        """Those of some of the groups."""
        return Choice(self.scale[index], self.zero[index])

    def put(self, number: int, found: Choice) -> None:
        """Enter what was chosen for one group, in place."""
        self.scale[number], self.zero[number] = found.scale, found.zero

    def where(self, condition: Tensor, other: Choice) -> Choice:
        """This where `condition` holds, else `other`."""
        return Choice(torch.where(condition, self.scale, other.scale), torch.where(condition, self.zero, other.zero))


@dataclass(frozen=True)
class Levels:
    """Level ``t`` of a group is ``t * step + shift``, ``low <= t <= high``; of a table, ``table[t] * step``.

    All four are fp32 ``[..., rows]``.
    """

    step: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor

    def of(self, index: int | slice | Tensor) -> Levels:
        """Those of some of the columns."""
        return Levels(self.step[index], self.shift[index], self.low[index], self.high[index])


class Grid:
    """What a spec lets a group of weights become.

    Args:
        spec: integers or a table, with one level of scales.
        symmetric: whether a zero point stays in the middle; so it is where a spec has none.
        device: of the weights.
    """

    def __init__(self, spec: QuantSpec, symmetric: bool, device: torch.device) -> None:
        self.spec = spec
        self.kind = spec.zero.kind if spec.zero else "none"
        self.symmetric = symmetric or spec.zero is None
        self.table: Tensor | None = None  # by code, as it is stored
        self.values: Tensor | None = None  # ascending
        if isinstance(spec.code, TableCode):
            self.table = table_of(spec.code).to(device)
            self.values, self._order = torch.sort(self.table, stable=True)
            self._between = (self.values[1:] + self.values[:-1]) / 2
            self.low, self.high, self.middle = 0, len(self.table) - 1, 0.0
            self.top = float(self.table.abs().max())
        elif isinstance(spec.code, IntCode):
            self.low, self.high = spec.code.low, spec.code.high
            self.middle = float(self.low + (1 << spec.bits - 1))
            self.top = (1 << spec.bits - 1) - 0.5

    def by_range(self, least: Tensor, most: Tensor) -> Choice:
        """Scale and zero that spread a range ``least <= 0 <= most`` over the levels."""
        if self.symmetric:
            largest = torch.maximum(-least, most)
            return self.store(largest / self.top, self.middle)
        scale = self.stored_scale((most - least) / (self.high - self.low))
        step = scale * self.spec.scale.multiplier
        zero = least - self.low * step if self.kind == "additive" else self.low - least / step
        return Choice(scale, self._stored_zero(zero))

    def store(self, step: Tensor, zero: Tensor | float) -> Choice:
        """A step and a zero point (in units of codes) as the spec stores them."""
        scale = self.stored_scale(step)
        if self.kind == "none":
            return Choice(scale, torch.zeros_like(scale))
        point = zero if isinstance(zero, Tensor) else torch.full_like(scale, zero)
        return Choice(
            scale, self._stored_zero(-point * scale * self.spec.scale.multiplier if self.kind == "additive" else point)
        )

    def stored_scale(self, step: Tensor) -> Tensor:
        """fp32, rounded to the dtype of the spec's scales; never 0, as weights are divided by it."""
        dtype = self.spec.scale.dtype
        wanted = step / self.spec.scale.multiplier
        stored = wanted.to(dtype).float()
        tiny = torch.where(wanted == 0, 1.0, torch.finfo(dtype).smallest_normal)
        return torch.where(stored == 0, tiny, stored)

    def _stored_zero(self, zero: Tensor) -> Tensor:
        if self.spec.zero is None:
            return torch.zeros_like(zero)
        if self.kind == "integer":
            return zero.round().clamp(self.low, self.high)
        return zero.to(self.spec.zero.dtype).float()

    def levels(self, choice: Choice) -> Levels:
        """What the scales and zeros of groups mean."""
        step = self.step(choice)
        low, high = torch.full_like(step, self.low), torch.full_like(step, self.high)
        if self.kind == "integer":
            return Levels(step, torch.zeros_like(step), low - choice.zero, high - choice.zero)
        shift = choice.zero if self.kind == "additive" else -choice.zero * step
        return Levels(step, shift, low, high)

    def nearest(self, weight: Tensor, levels: Levels) -> Tensor:
        """The level ``t`` nearest to each weight, fp32; ties to even, in a table to the lower entry."""
        if self.values is not None:
            return torch.bucketize(weight / levels.step, self._between, out_int32=True).float()
        if self.kind in ("none", "integer"):
            return (weight / levels.step).round_().clamp_(levels.low, levels.high)
        return ((weight - levels.shift) / levels.step).round_().clamp_(levels.low, levels.high)

    def value(self, level: Tensor, levels: Levels) -> Tensor:
        """The weight that a level stands for."""
        if self.kind in ("none", "integer"):
            return self.direction(level) * levels.step
        return torch.addcmul(levels.shift, level, levels.step)

    def codes(self, level: Tensor, choice: Choice) -> Tensor:
        """Levels as the spec codes them, int16."""
        if self.values is not None:
            return self._order[level.long()].to(torch.int16)
        return (level + choice.zero if self.kind == "integer" else level).to(torch.int16)

    @property
    def real_zero(self) -> bool:
        """Whether the zero is a real number that can be fitted along with the scale."""
        return self.kind in ("float", "additive") and not self.symmetric

    def direction(self, level: Tensor) -> Tensor:
        """By how much a weight grows with the step."""
        if self.values is not None:
            return self.values[level.int()]
        return level - self.middle if self.kind in ("float", "additive") and self.symmetric else level

    def refit(self, weight: Tensor, level: Tensor, importance: Tensor, before: Choice) -> Choice:
        """The best scales (and zeros, where they are real) for given levels: weighted least squares, then stored.

        Args:
            weight: ``[n, rows]``.
            level: ``[n, rows]``.
            importance: ``[n]``, the weight of each column's squared error.
            before: kept where the levels say nothing.
        """
        unit = self.direction(level)
        if not self.real_zero:
            step = (importance @ (weight * unit)) / (importance @ unit.square())
            return self.kept_where_valid(step, self.resting_point(before), before)
        total = importance.sum()
        mean_unit, mean_weight = (importance @ unit) / total, (importance @ weight) / total
        centred = unit - mean_unit
        step = (importance @ (centred * (weight - mean_weight))) / (importance @ centred.square())
        return self.kept_where_valid(step, mean_unit - mean_weight / self.stored_step(step), before)

    def resting_point(self, choice: Choice) -> Tensor | float:
        """The zero point, in units of codes, where it is not fitted."""
        return choice.zero if self.kind == "integer" else self.middle

    def kept_where_valid(self, step: Tensor, zero: Tensor | float, before: Choice) -> Choice:
        """What :meth:`store` makes of them where that is a positive, finite step; `before` elsewhere."""
        choice = self.store(step, zero)
        good = torch.isfinite(step) & (step > 0) & torch.isfinite(choice.scale) & torch.isfinite(choice.zero)
        return choice.where(good, before)

    def step(self, choice: Choice) -> Tensor:
        """What lies between two levels."""
        return choice.scale * self.spec.scale.multiplier

    def stored_step(self, step: Tensor) -> Tensor:
        """The step that a stored scale gives back."""
        return self.stored_scale(step) * self.spec.scale.multiplier


def table_of(code: TableCode) -> Tensor:
    """The table that a code is named after, fp32.

    Raises:
        PlanError: its values are known only to whoever stored it.
    """
    if code.name in _TABLES:
        return torch.tensor(_TABLES[code.name], dtype=torch.float32)
    return named_table(code.name).clone()


def squared_error(grid: Grid, weight: Tensor, importance: Tensor, choice: Choice) -> Tensor:
    """``[rows]``: the squared error of rounding ``[n, rows]`` to nearest, weighted by column; inf on overflow."""
    levels = grid.levels(choice)
    error = grid.value(grid.nearest(weight, levels), levels).sub_(weight).square_()
    return (importance @ error).nan_to_num_(torch.inf, posinf=torch.inf)


def by_range(grid: Grid, weight: Tensor) -> Choice:
    """From the minimum to the maximum of each group, zero included.

    Args:
        weight: ``[n, rows]``.
    """
    return grid.by_range(weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0))


def search(grid: Grid, weight: Tensor, importance: Tensor) -> Choice:
    """The scales and zeros with the least weighted squared error that a grid search and least squares find.

    Both ends of the range shrink together; then, where there is a zero point, each by itself; then zero points move
    by one and scales are fitted to the codes. A candidate is taken where it is better, row by row.

    Args:
        grid: what the group can become.
        weight: ``fp32 [n, rows]``.
        importance: ``fp32 [n]``, not negative.
    """
    least, most = weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0)
    best = grid.by_range(least, most)
    error = squared_error(grid, weight, importance, best)
    low, high = least, most
    ratios = _POWERS if grid.spec.scale.dtype == torch.float8_e8m0fnu else _SHRINK
    ends = [(ratio, ratio) for ratio in ratios]
    alone = [] if grid.symmetric else [(ratio, 1.0) for ratio in _ENDS] + [(1.0, ratio) for ratio in _ENDS]
    for tried in (ends, alone):
        least, most = low, high
        for lower, upper in tried:
            candidate = grid.by_range(least * lower, most * upper)
            found = squared_error(grid, weight, importance, candidate)
            better = found < error
            best, error = candidate.where(better, best), torch.minimum(found, error)
            low, high = torch.where(better, least * lower, low), torch.where(better, most * upper, high)
    return _polish(grid, weight, importance, best, error)


def _polish(grid: Grid, weight: Tensor, importance: Tensor, best: Choice, error: Tensor) -> Choice:
    moves = (0, 0, 1, -1) if grid.kind == "integer" and not grid.symmetric else (0,) * _REFITS
    for move in moves:
        start = best if not move else Choice(best.scale, (best.zero + move).clamp(grid.low, grid.high))
        candidate = grid.refit(weight, grid.nearest(weight, grid.levels(start)), importance, start)
        found = squared_error(grid, weight, importance, candidate)
        better = found < error
        best, error = candidate.where(better, best), torch.minimum(found, error)
    return best
