"""ggml's IQ2 and IQ3: magnitudes eight (four) at a time from a grid, signs apart, 4-bit scales; llama.cpp's search.

For a few scales of each group of weights the nearest vectors are found (:mod:`lowbit.algorithms.neighbours`), and the
scale that fits them best is solved for; the best of these stays. Where the signs of eight weights have to be even in
number, the one that matters least is turned over.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.algorithms import kquants
from lowbit.algorithms.ggml_parts import (
    SUPER,
    Parts,
    columns_of,
    importance_weights,
    require_finite,
    square_root,
)
from lowbit.algorithms.kquants import fp32, ratio, total
from lowbit.algorithms.neighbours import Neighbours, neighbours_of
from lowbit.core.block_encoding import BlockFields, encode_blocks


class Lattice(NamedTuple):
    """How a type is searched.

    Attributes:
        grid: of :data:`lowbit.core.blocks.GRIDS`.
        group: weights that share a scale.
        even: whether the eighth sign makes the number of minuses even.
        spread: see :class:`Neighbours`.
        factor: of the mean of squares in the weights of errors.
        tries: candidates on either side of the first, and the step between them.
        least: groups that stay below are all zeros.
        fitted: whether the first scale is one fitted to whole numbers, instead of the maximum over the largest value.
        again: which vectors are chosen anew when the scale is known: all, those off the grid, or all if any is off.
        stretch: what the block's scale is multiplied with in the end.
    """

    grid: str
    group: int
    even: bool
    spread: int
    factor: int
    tries: tuple[int, float]
    least: float
    again: str
    fitted: bool = False
    stretch: float = 1.0


LATTICES: Final = {
    "IQ2_XXS": Lattice("iq2_xxs", 32, True, 2, 1, (6, 0.1), 1e-15, "all", fitted=True),
    "IQ2_XS": Lattice("iq2_xs", 16, True, 2, 1, (9, 0.1), 1e-15, "off"),
    "IQ2_S": Lattice("iq2_s", 16, False, 1, 2, (9, 0.1), 1e-8, "off", stretch=0.9875),
    "IQ3_XXS": Lattice("iq3_xxs", 32, True, 2, 2, (15, 0.2), 1e-8, "off", stretch=1.0125),
    "IQ3_S": Lattice("iq3_s", 32, False, 3, 2, (9, 0.2), 1e-30, "any", stretch=1.033),
}


class _Groups(NamedTuple):
    """Groups in columns: magnitudes ``[group, n]``, of which few are negative; weights; signs ``[group / 8, n]``."""

    x: Tensor
    weights: Tensor
    signs: Tensor


class _Fit(NamedTuple):
    """A scale per group ``[n]`` and the vectors ``int32 [group / size, n]``."""

    scale: Tensor
    vectors: Tensor


def search_lattice(name: str, rows: Tensor, importance: Tensor | None) -> BlockFields:
    """Vectors, signs and scales of every block of ``fp32 [rows, in]``."""
    lattice = LATTICES[name]
    grid = neighbours_of(lattice.grid, lattice.spread, rows.device)
    groups = _magnitudes(columns_of(rows, lattice.group), _weights(name, lattice, rows, importance), lattice.even)
    fit = _search(lattice, grid, groups)
    flipped = fit.scale < 0  # a maximum over numbers of which one is negative can give this, in theory
    signs = torch.where(flipped, ~groups.signs, groups.signs)
    empty = fit.scale == 0
    blocks = SUPER // lattice.group
    scale = fit.scale.abs().view(-1, blocks)
    top = scale.amax(1, keepdim=True) / 31
    scales = (ratio(1, top) * scale).sub_(1).mul_(0.5).round_().clamp_(0, 15)
    super_scale = top.squeeze(1) if lattice.stretch == 1.0 else top.squeeze(1) * fp32(lattice.stretch)
    return BlockFields(
        by_block(fit.vectors.masked_fill(empty, 0), blocks),
        by_block(signs.masked_fill(empty, 0), blocks),
        scales.to(torch.uint8),
        super_scale.half(),
    )


def make_lattice(name: str, rows: Tensor, importance: Tensor | None) -> Parts:
    """The blocks of ``fp32 [rows, in]``: ``codes``, ``uint8 [rows, blocks, bytes]``."""
    fields = search_lattice(name, rows, importance)
    return encoded(name, fields, len(rows))


def encoded(name: str, fields: BlockFields, rows: int) -> Parts:
    """Fields as ``codes``.

    Raises:
        PlanError: a block's scale is too large for fp16.
    """
    require_finite(name, fields.super_scale)
    codes = encode_blocks(name.lower(), fields)
    return {"codes": codes.view(rows, -1, codes.shape[1])}


def by_block(numbers: Tensor, groups: int) -> Tensor:
    """``[k, n] -> [n / groups, groups * k]``, in the order of the weights."""
    return numbers.t().reshape(-1, groups * numbers.shape[0])


def _weights(name: str, lattice: Lattice, rows: Tensor, importance: Tensor | None) -> Tensor:
    if importance is not None:
        return columns_of(importance_weights(rows, importance, SUPER, lattice.factor), lattice.group)
    squares = columns_of(rows * rows, lattice.group)
    if name != "IQ2_S":
        return squares
    means = lattice.factor * total(columns_of(rows * rows, SUPER)) / SUPER
    return 0.25 * means.repeat_interleave(SUPER // lattice.group) + squares


def _magnitudes(x: Tensor, weights: Tensor, even: bool) -> _Groups:
    negative = (x < 0).unflatten(0, (-1, 8))
    magnitude = x.abs()
    if even:
        odd = negative.sum(1) % 2 == 1
        least = (weights * x).mul_(x).unflatten(0, (-1, 8)).argmin(1, keepdim=True)
        turned = torch.zeros_like(negative).scatter_(1, least, odd.unsqueeze(1))
        negative = negative ^ turned
        magnitude = torch.where(turned.flatten(0, 1), -magnitude, magnitude)
    bits = 1 << torch.arange(8, device=x.device).view(1, 8, 1)
    return _Groups(magnitude, weights, (negative * bits).sum(1).to(torch.uint8))


def _search(lattice: Lattice, grid: Neighbours, groups: _Groups) -> _Fit:
    """The best of the candidate scales and its vectors, then once more with the scale that it led to."""
    top = 2 * grid.levels - 1
    largest = groups.x.amax(0)
    empty = largest < fp32(lattice.least)
    if lattice.fitted:
        start = kquants.search_positive(groups.x, groups.weights, grid.levels + 1).scale
        largest = start * grid.levels
        empty = empty | (largest <= 0)
        scale = start
    else:
        scale = largest / top
    vectors = _Vectors(grid, groups)
    index = torch.zeros(vectors.shape, dtype=torch.int32, device=largest.device)
    on_grid = torch.full(vectors.shape, lattice.again != "any", device=largest.device)
    best = torch.zeros_like(largest)
    number, step = lattice.tries
    for candidate in range(-number, number + 1):
        inverse = ratio(fp32(top + fp32(candidate * fp32(step))), largest).masked_fill(empty, 0)
        tried, whole = vectors.nearest(inverse, ratio(1, inverse))
        products, squares = vectors.sums(tried)
        better = (squares > 0) & (products * products > best * squares)
        scale = torch.where(better, products / squares, scale)
        best = torch.where(better, scale * products, best)
        index, on_grid = torch.where(better, tried, index), torch.where(better, whole, on_grid)
    anew = torch.ones_like(on_grid) if lattice.again == "all" else ~on_grid
    if lattice.again == "any":
        anew = anew.any(0).expand_as(anew)
    anew = anew & (scale > 0)
    index = torch.where(anew, vectors.nearest(ratio(1, scale), scale)[0], index)
    products, squares = vectors.sums(index)
    scale = torch.where(anew.any(0) & (squares > 0), products / squares, scale)
    return _Fit(scale.masked_fill(empty, 0), index)


class _Vectors:
    """Groups as vectors, ``[size, group / size * n]``."""

    def __init__(self, grid: Neighbours, groups: _Groups) -> None:
        count = groups.x.shape[0] // grid.size
        self.shape = (count, groups.x.shape[1])
        self._grid, self._weights = grid, groups.weights
        self._weighted = groups.weights * groups.x
        self._x = self._apart(groups.x)
        self._roots = self._apart(square_root(groups.weights))

    def _apart(self, numbers: Tensor) -> Tensor:
        return numbers.view(self.shape[0], self._grid.size, -1).transpose(0, 1).reshape(self._grid.size, -1)

    def nearest(self, inverse: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest vectors of each group's scale, and which are the points of the lattice themselves."""
        points = self._grid.round(self._x, inverse.repeat(self.shape[0]))
        index, on_grid = self._grid.find(points, self._x, self._roots, scale.repeat(self.shape[0]))
        return index.view(self.shape), on_grid.view(self.shape)

    def sums(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sums of ``x * q`` and ``q * q`` per group."""
        odd = self._grid.odd.index_select(1, index.view(-1)).view(self._grid.size, *self.shape)
        q = odd.transpose(0, 1).reshape(-1, self.shape[1])
        return total(self._weighted * q), total((self._weights * q).mul_(q))
