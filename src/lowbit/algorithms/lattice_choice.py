"""One vector of a grid for eight weights at a time, errors counted by a whole 8 x 8 matrix instead of its diagonal.

The best few by the diagonal alone are found with one matrix product over the grid, with the signs that the weights have
(one turned over where their number has to be even); of these the best by the matrix is taken, and then the best way to
turn a sign (or two) over, if any helps.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.core.blocks import GRIDS, grid_levels

_SHORTLIST: Final = 16
_PAIRED: Final = 5  # of each of two vectors of four, whose combinations are compared
_ROWS: Final = 2048  # rows at once: each has a number for every vector of the grid


class Chosen(NamedTuple):
    """For each row the vectors' numbers ``int64 [8 / size, rows]``, the stored signs (or shifts) ``int64 [rows]``, and
    what they stand for before it is scaled, ``fp32 [8, rows]``.
    """

    vectors: Tensor
    signs: Tensor
    values: Tensor


class VectorChoice:
    """Chooses vectors for one type.

    Args:
        grid: of :data:`GRIDS`.
        even: whether the number of minuses is even.
        shifts: IQ1: by how much the vectors may be shifted; signs then say which of them, and vectors have their own.
    """

    def __init__(self, grid: str, even: bool, shifts: tuple[float, ...], device: torch.device) -> None:
        self.even, self.shifts = even, shifts
        kind = GRIDS[grid]
        values = torch.tensor(kind.values, dtype=torch.float32, device=device)
        self.grid = values[grid_levels(grid, device)]
        self.halves = 8 // kind.size
        if shifts:
            self.grid = torch.cat([self.grid + shift for shift in shifts])
        self.count = kind.vectors
        self.flips = _flips(even, device)

    def choose(self, target: Tensor, scale: Tensor, metric: Tensor, shift: Tensor | None = None) -> Chosen:
        """The vectors with the least ``eᵀ metric e``, ``e = scale * value - target``.

        Args:
            target: ``fp32 [8, rows]``.
            scale: ``fp32 [rows]``; where it is 0 any vector is as good as another.
            metric: ``fp32 [8, 8]``, positive definite.
            shift: where it isn't free, which of the shifts each row has, ``[rows]``.
        """
        step = _ROWS
        pieces = [
            self._choose(
                target[:, first : first + step],
                scale[first : first + step],
                metric,
                None if shift is None else shift[first : first + step],
            )
            for first in range(0, target.shape[1], step)
        ]
        return Chosen(
            torch.cat([piece.vectors for piece in pieces], dim=1),
            torch.cat([piece.signs for piece in pieces]),
            torch.cat([piece.values for piece in pieces], dim=1),
        )

    def _choose(self, target: Tensor, scale: Tensor, metric: Tensor, shift: Tensor | None) -> Chosen:
        diagonal = metric.diagonal()
        rows = target.t()
        signs = torch.ones_like(rows) if self.shifts else self._signs(rows, diagonal)
        listed = self._shortlist(rows * signs, scale, diagonal, shift)
        values = self.grid[listed].flatten(2) * signs.unsqueeze(1)
        error = values * scale.view(-1, 1, 1) - rows.unsqueeze(1)
        best = ((error @ metric) * error).sum(-1).argmin(1)
        every = torch.arange(len(best), device=best.device)
        index, values = listed[every, best], values[every, best]
        if self.shifts:
            return Chosen((index % self.count).t(), (index // self.count)[:, 0], values.t())
        values = self._turned(values, rows, scale, metric)
        return Chosen(index.t(), _sign_bits(values), values.t())

    def _signs(self, rows: Tensor, diagonal: Tensor) -> Tensor:
        signs = torch.where(rows < 0, -1.0, 1.0)
        if not self.even:
            return signs
        odd = signs.prod(1, keepdim=True)
        least = (rows * rows * diagonal).argmin(1, keepdim=True)
        return signs.scatter(1, least, signs.gather(1, least) * odd)

    def _shortlist(self, magnitudes: Tensor, scale: Tensor, diagonal: Tensor, shift: Tensor | None) -> Tensor:
        """Numbers of vectors, ``int64 [rows, listed, halves]``, the best by the diagonal."""
        size = self.grid.shape[1]
        lists = []
        for half in range(self.halves):
            part = slice(half * size, half * size + size)
            weighted = magnitudes[:, part] * diagonal[part]
            norms = self.grid.square() @ diagonal[part]
            costs = scale.unsqueeze(1) * norms - 2 * weighted @ self.grid.t()
            if shift is not None:
                own = torch.arange(len(self.grid), device=scale.device) // self.count == shift.unsqueeze(1)
                costs = costs.masked_fill(~own, torch.inf)
            lists.append(costs.topk(_SHORTLIST if self.halves == 1 else _PAIRED, dim=1, largest=False).indices)
        if self.halves == 1:
            return lists[0].unsqueeze(2)
        first = lists[0].repeat_interleave(_PAIRED, dim=1)
        return torch.stack([first, lists[1].repeat(1, _PAIRED)], dim=2)

    def _turned(self, values: Tensor, rows: Tensor, scale: Tensor, metric: Tensor) -> Tensor:
        """With a sign (or two, where their number is even) turned over, where that is better."""
        error = values * scale.unsqueeze(1) - rows
        # A change c of the error costs 2 c·(metric e) + cᵀ metric c.
        change = -2 * scale.unsqueeze(1) * values
        slope = 2 * change * (error @ metric)
        pairs = (change.unsqueeze(2) * metric * change.unsqueeze(1)).flatten(1)
        masks = self.flips
        outer = (masks.unsqueeze(2) * masks.unsqueeze(1)).flatten(1)
        cost = slope @ masks.t() + pairs @ outer.t()
        best = masks[cost.argmin(1)]
        return values * (1 - 2 * best)


@functools.cache
def _flips(even: bool, device: torch.device) -> Tensor:
    """Which signs may be turned over together: none, one or two; ``fp32 [ways, 8]``."""
    eye = torch.eye(8, device=device)
    none, pairs = torch.zeros(1, 8, device=device), torch.combinations(torch.arange(8, device=device))
    return torch.cat([none, eye[pairs[:, 0]] + eye[pairs[:, 1]]] if even else [none, eye])


def _sign_bits(values: Tensor) -> Tensor:
    return ((values < 0).to(torch.int64) << torch.arange(8, device=values.device)).sum(1)


@functools.cache
def choice_for(name: str, device: torch.device) -> VectorChoice:
    """The one for a type, such as ``IQ2_XS``."""
    grid = "iq1_s" if name == "IQ1_M" else name.lower()
    shifts = (0.125, -0.125) if name.startswith("IQ1") else ()
    return VectorChoice(grid, name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"), shifts, device)
