"""Coordinate descent on what is quantized already: each code, each scale, given all the others.

GPTQ decides a column without knowing those that follow. Afterwards all are known, and the error
``tr((W - Q) H (W - Q)ᵀ)`` of a row is quadratic in each of its numbers: a code's best value is the level nearest to
``q + (H e)ᵢ / H[i, i]`` with ``e`` the row's error (as in QuantEase, arXiv:2309.01885), a scale's the least-squares one
against the whole Hessian. Neither step can make the error larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.algorithms.columns import ColumnLoop
from lowbit.algorithms.grid import Choice, Grid


class Descent:
    """A weight and what it has become, its columns first: ``fp32 [in, rows]``.

    Args:
        grid: what the spec allows.
        loop: over its columns.
        target: what the levels stand for at best.
        levels: the present ones; changed by :meth:`sweep`.
        choice: scales and zeros of all groups, ``[groups, rows]``; changed by :meth:`sweep`.
        members: of each group, its columns.
        hessian: ``fp32 [in, in]``, with a positive diagonal.
    """

    def __init__(
        self,
        grid: Grid,
        loop: ColumnLoop,
        target: Tensor,
        levels: Tensor,
        choice: Choice,
        members: list[Tensor],
        hessian: Tensor,
    ) -> None:
        self.grid, self.levels, self.choice, self.members, self.hessian = grid, levels, choice, members, hessian
        self.loop = loop
        self.error = target.clone()
        for number, columns in enumerate(members):
            self.error[columns] -= grid.value(levels[columns], grid.levels(choice.of(slice(number, number + 1))))

    def sweep(self, block_size: int) -> None:
        """Choose every code once, and after those of a group its scale and zero."""
        for number, columns in enumerate(self.members):
            for piece in columns.split(block_size):
                self._codes(piece, number)
            self._scale(columns, number)

    def _codes(self, columns: Tensor, number: int) -> None:
        among = self.hessian[columns]
        within = among[:, columns]
        diagonal = within.diagonal()
        meaning = self.grid.levels(self.choice.of(slice(number, number + 1)))
        before = self.grid.value(self.levels[columns], meaning)
        wanted = before + (among @ self.error) / diagonal.unsqueeze(1)
        levels, changes = self.loop.run(wanted, within / diagonal, meaning, before)
        self.levels[columns] = levels
        self.error[columns] -= changes

    def _scale(self, columns: Tensor, number: int) -> None:
        among, levels, error = self.hessian[columns], self.levels[columns], self.error[columns]
        within, slope = among[:, columns], among @ self.error
        old = self.choice.of(number)
        new = self._fitted(levels, slope, within, old)
        meaning = self.grid.levels(new)
        change = self.grid.value(levels, meaning) - self.grid.value(levels, self.grid.levels(old))
        gain = (change * (2 * slope - within @ change)).sum(0)
        self.choice.put(number, new.where(gain > 0, old))
        self.error[columns] = error - torch.where(gain > 0, change, 0)

    def _fitted(self, levels: Tensor, slope: Tensor, within: Tensor, old: Choice) -> Choice:
        """Least squares against the Hessian, given all other groups."""
        grid = self.grid
        step = grid.step(old)
        unit = grid.direction(levels)
        pulled, curved = (unit * slope).sum(0), (unit * (within @ unit)).sum(0)
        if grid.real_zero:
            shift = grid.levels(old).shift
            ones, total = within.sum(1), within.sum()
            crossed, lifted = ones @ unit, slope.sum(0)
            determinant = curved * total - crossed.square()
            step = step + (pulled * total - lifted * crossed) / determinant
            shift = shift + (lifted * curved - pulled * crossed) / determinant
            return grid.kept_where_valid(step, -shift / grid.stored_step(step), old)
        return grid.kept_where_valid(step + pulled / curved, grid.resting_point(old), old)
