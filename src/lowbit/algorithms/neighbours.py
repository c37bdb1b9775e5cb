"""The nearest vectors of ggml's grids, for IQ1, IQ2 and IQ3.

Rounding each number by itself gives a point of a lattice. If the grid has it, that is it; else the grid's vectors that
lie nearest to the point (at the `spread` smallest distances) are compared, errors weighted, and the first of the best
is taken. That is llama.cpp's search, and its lists in its order; the bits depend on both.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from lowbit.algorithms.kquants import total
from lowbit.core.blocks import GRIDS, grid_levels

_AT_ONCE: Final = 1 << 14  # pairs of a vector and a neighbour that are compared in one go; on GPUs more
_AT_ONCE_GPU: Final = 1 << 20
_WIDEST: Final = 64  # neighbours of one vector in one go


class Neighbours:
    """A grid, and for every other point of its lattice the vectors nearby.

    Attributes:
        size: of a vector.
        levels: how many values an entry may have.
        odd: the grid's vectors as the odd numbers 1, 3, 5 .., ``fp32 [size, vectors]``.
        stride: bits per entry in the number of a point.

    Args:
        name: of :data:`GRIDS`.
        spread: how many different distances the neighbours may have.
    """

    def __init__(self, name: str, spread: int, device: torch.device) -> None:
        grid = GRIDS[name]
        levels = grid_levels(name, device)
        self.size, self.levels, self.stride = grid.size, len(grid.values), grid.bits
        self.odd = (2.0 * levels.t() + 1).contiguous()
        shifts = grid.bits * torch.arange(grid.size, device=device)
        axes = [torch.arange(self.levels, device=device)] * grid.size
        points = torch.cartesian_prod(*axes)
        numbers = (points << shifts).sum(1)
        self._index = torch.full((1 << grid.bits * grid.size,), -1, dtype=torch.int32, device=device)
        self._index[(levels << shifts).sum(1)] = torch.arange(grid.vectors, dtype=torch.int32, device=device)
        apart = self._index[numbers] < 0
        owners, self._list = _nearby(points[apart].float(), levels.float(), spread)
        counts = torch.bincount(owners, minlength=int(apart.sum()))
        self._count = torch.zeros_like(self._index)
        self._start = torch.zeros_like(self._index)
        self._count[numbers[apart]] = counts.to(torch.int32)
        self._start[numbers[apart]] = (counts.cumsum(0) - counts).to(torch.int32)

    def round(self, x: Tensor, inverse: Tensor) -> Tensor:
        """The points nearest to numbers ``[size, n]`` over scales ``[n]``, given as inverses; ``int32 [n]``."""
        levels = (x * inverse).sub_(1).mul_(0.5).round_().clamp_(0, self.levels - 1).to(torch.int32)
        return self.number(levels)

    def number(self, levels: Tensor) -> Tensor:
        """``[size, n]`` of levels as the number of a point, ``int32 [n]``."""
        number = levels[0].to(torch.int32)
        for position in range(1, self.size):
            number = number + (levels[position].to(torch.int32) << self.stride * position)
        return number

    def find(
        self,
        points: Tensor,
        x: Tensor,
        weights: Tensor,
        scale: Tensor,
        values: Tensor | None = None,
        table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The vector for each point: itself, or the neighbour with the least ``sum weights * (scale * value - x)²``.

        Args:
            points: ``int32 [n]``.
            x: ``fp32 [size, n]``.
            weights: likewise.
            scale: ``fp32 [n]``.
            values: what the grid's vectors stand for if not :attr:`odd`; ``fp32 [size, tables * vectors]``.
            table: which of the tables, ``int32 [n]``.

        Returns:
            ``int32 [n]``, and where the point is on the grid.
        """
        index = self._index.index_select(0, points)
        on_grid = index >= 0
        apart = (~on_grid).nonzero().squeeze(1)
        if not len(apart):
            return index, on_grid
        values = self.odd if values is None else values
        counts = self._count.index_select(0, points.index_select(0, apart))
        counts, order = counts.sort(descending=True)
        apart = apart.index_select(0, order)
        starts = self._start.index_select(0, points.index_select(0, apart))
        x, weights = x.index_select(1, apart), weights.index_select(1, apart)
        scale = scale.index_select(0, apart)
        first = None if table is None else table.index_select(0, apart) * self.odd.shape[1]
        # How many points have more than j neighbours.
        longer = (len(apart) - torch.bincount(counts).cumsum(0)).tolist()[:-1]
        best = torch.full_like(scale, torch.inf)
        chosen = torch.zeros_like(starts)
        position, at_once = 0, _AT_ONCE_GPU if x.is_cuda else _AT_ONCE
        while position < len(longer):
            length = longer[position]
            width = max(1, min(_WIDEST, at_once // length, len(longer) - position))
            part = torch.arange(position, position + width, dtype=torch.int32, device=x.device).unsqueeze(1)
            place = (starts[:length] + part).clamp_(max=len(self._list) - 1).view(-1)
            candidate = self._list.index_select(0, place).view(width, length)
            column = candidate if first is None else candidate + first[:length]
            difference = values.index_select(1, column.view(-1)).view(self.size, width, length)
            difference = difference.mul_(scale[:length]).sub_(x[:, :length].unsqueeze(1))
            error = total((weights[:, :length].unsqueeze(1) * difference).mul_(difference))
            error.masked_fill_(part >= counts[:length], torch.inf)
            least, which = error.min(0)
            better = least < best[:length]
            best[:length] = torch.where(better, least, best[:length])
            chosen[:length] = torch.where(better, candidate.gather(0, which.unsqueeze(0))[0], chosen[:length])
            position += width
        return index.index_copy(0, apart, chosen), on_grid


def _nearby(points: Tensor, grid: Tensor, spread: int) -> tuple[Tensor, Tensor]:
    """Pairs of a point and a vector of the grid: by point, then distance, then the vector's number."""
    owners, vectors = [], []
    for first in range(0, len(points), 1024):
        part = points[first : first + 1024]
        # Whole numbers far below 2**24, so that the order of the sums doesn't matter.
        distance = part.square().sum(1, keepdim=True) + grid.square().sum(1) - 2 * part @ grid.t()
        limit = distance.amin(1, keepdim=True)
        for _ in range(spread - 1):
            limit = distance.masked_fill(distance <= limit, torch.inf).amin(1, keepdim=True)
        owner, vector = (distance <= limit).nonzero(as_tuple=True)
        key = (owner << 40) + (distance[owner, vector].to(torch.int64) << 20) + vector
        order = key.argsort()
        owners.append(owner[order] + first)
        vectors.append(vector[order].to(torch.int32))
    return torch.cat(owners), torch.cat(vectors)


@functools.cache
def neighbours_of(name: str, spread: int, device: torch.device) -> Neighbours:
    """The one :class:`Neighbours` of a grid on a device."""
    return Neighbours(name, spread, device)
