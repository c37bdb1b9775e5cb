"""ggml's IQ1: -1, 0 and 1, eight at a time from a grid, all shifted by an eighth up or down; llama.cpp's search.

Of a group in ascending order the first are -1, the last 1 and those between 0, so all ways to cut it in three are
tried, with each shift. What isn't on the grid then becomes the nearest vector that is
(:mod:`lowbit.algorithms.neighbours`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.algorithms.ggml_parts import SUPER, Parts, columns_of, importance_weights
from lowbit.algorithms.kquants import fp32, ratio, total
from lowbit.algorithms.lattices import by_block, encoded
from lowbit.algorithms.neighbours import Neighbours, neighbours_of
from lowbit.core.block_encoding import BlockFields

_SHIFT: Final = 0.125
_UP: Final = (-1 + _SHIFT, _SHIFT, 1 + _SHIFT)
_DOWN: Final = (-1 - _SHIFT, -_SHIFT, 1 - _SHIFT)

_Shifts = Callable[[Tensor], Tensor]


class _Cut(NamedTuple):
    """The best way to cut each group in three.

    Attributes:
        levels: 0, 1, 2 for -1, 0, 1; ``int64 [group, n]``.
        down: which shift, ``bool [shifts, n]``; the same for all or for each half.
        scale: ``fp32 [n]``, not negative.
        found: whether there is one.
    """

    levels: Tensor
    down: Tensor
    scale: Tensor
    found: Tensor


class _Best:
    """The best of several cuts so far, the first of equals."""

    def __init__(self, like: Tensor) -> None:
        self.score = torch.full_like(like, -torch.finfo(torch.float32).max)
        self.scale = torch.zeros_like(like)
        self.which = torch.full_like(like, -1, dtype=torch.int32)

    def offer(self, products: Tensor, squares: Tensor, number: int) -> None:
        better = (squares > 0) & (products * products > self.score * squares)
        scale = products / squares
        self.scale = torch.where(better, scale, self.scale)
        self.score = torch.where(better, scale * products, self.score)
        self.which.masked_fill_(better, number)


def make_ternary(name: str, rows: Tensor, importance: Tensor | None) -> Parts:
    """The blocks of ``fp32 [rows, in]``: ``codes``, ``uint8 [rows, blocks, bytes]``."""
    return encoded(name, search_ternary(name, rows, importance), len(rows))


def search_ternary(name: str, rows: Tensor, importance: Tensor | None) -> BlockFields:
    """Vectors, shifts and scales of every block of ``fp32 [rows, in]``."""
    return _search_iq1_s(rows, importance) if name == "IQ1_S" else _search_iq1_m(rows, importance)


def _search_iq1_s(rows: Tensor, importance: Tensor | None) -> BlockFields:
    """Groups of 32 that share scale and shift."""
    x, weights = columns_of(rows, 32), _weights(rows, importance, 32)
    cut = _cut_whole(x, weights)
    found = cut.found & (x.abs().amax(0) >= fp32(1e-12))
    index, scale = _on_grid(x, weights, cut)
    scale = scale.masked_fill(~found, 0).view(-1, 8)
    top = scale.amax(1, keepdim=True) / 15
    down = cut.down.masked_fill(~found, False)
    fields = BlockFields(
        by_block(index.masked_fill(~found, 0), 8),
        by_block(down, 8).to(torch.uint8),
        _eighths(scale, top),
        (top.squeeze(1) * 1.125).half(),
    )
    return _zeroed(fields, top.squeeze(1) == 0)


def _search_iq1_m(rows: Tensor, importance: Tensor | None) -> BlockFields:
    """Groups of 16 that share a scale, and a shift for each eight; the block's scale is fitted in the end."""
    x, weights = columns_of(rows, 16), _weights(rows, importance, 16)
    cut = _cut_halves(x, weights)
    found = cut.found & (x.abs().amax(0) >= fp32(1e-7))
    index, scale = _on_grid(x, weights, cut)
    index = index.masked_fill(~found, 0)
    down = cut.down.masked_fill(~found, False)
    scale = scale.masked_fill(~found, 0).view(-1, 16)
    top = scale.amax(1, keepdim=True) / 15
    scales = _eighths(scale, top)
    q = _values(_grid(x.device), index, down) * (2 * scales.float() + 1).reshape(-1)
    weighted = weights * q
    in_order = [columns_of(part.t().reshape(len(rows), -1), SUPER) for part in (weighted * x, weighted * q)]
    products, norms = total(in_order[0]), total(in_order[1])
    top = torch.where(norms > 0, products / norms, top.squeeze(1)).masked_fill(top.squeeze(1) == 0, 0)
    return BlockFields(by_block(index, 16), by_block(down, 16).to(torch.uint8), scales, (top * fp32(1.1125)).half())


def _weights(rows: Tensor, importance: Tensor | None, group: int) -> Tensor:
    weights = rows * rows if importance is None else importance_weights(rows, importance, SUPER, 2)
    return columns_of(weights, group)


def _zeroed(fields: BlockFields, empty: Tensor) -> BlockFields:
    """Blocks without any scale are zero bytes."""
    gone = empty.unsqueeze(1)
    return fields._replace(signs=fields.signs.masked_fill(gone, 0), scales=fields.scales.masked_fill(gone, 0))


def _eighths(scale: Tensor, top: Tensor) -> Tensor:
    return (ratio(1, top) * scale).sub_(1).mul_(0.5).round_().clamp_(0, 7).to(torch.uint8)


def _grid(device: torch.device) -> Neighbours:
    return neighbours_of("iq1_s", 3, device)


def _sorted(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups in ascending order with their weights, and the order; equal numbers stay as they are."""
    ascending, order = x.sort(dim=0, stable=True)
    return ascending, weights.gather(0, order), order


def _running(terms: Tensor) -> list[Tensor]:
    """Sums of the first 0, 1, .. rows."""
    sums = [torch.zeros_like(terms[0])]
    for term in terms:
        sums.append(sums[-1] + term)
    return sums


def _cuts(size: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(size + 1) for second in range(first, size + 1)]


def _cut_whole(x: Tensor, weights: Tensor) -> _Cut:
    """One shift for the group."""
    ascending, sorted_weights, order = _sorted(x, weights)
    sum_x, sum_w = _running(sorted_weights * ascending), _running(sorted_weights)
    best, cuts = _Best(x[0]), _cuts(x.shape[0])
    for number, (first, second) in enumerate(cuts):
        parts_x = (sum_x[first], sum_x[second] - sum_x[first], sum_x[-1] - sum_x[second])
        parts_w = (sum_w[first], sum_w[second] - sum_w[first], sum_w[-1] - sum_w[second])
        for shift, values in enumerate((_UP, _DOWN)):
            products = parts_x[0] * values[0] + parts_x[1] * values[1] + parts_x[2] * values[2]
            squares = [part * value * value for part, value in zip(parts_w, values, strict=True)]
            best.offer(products, squares[0] + squares[1] + squares[2], 2 * number + shift)
    return _as_cut(best, cuts, order, 2, lambda choice: (choice % 2 == 1).unsqueeze(0))


def _cut_halves(x: Tensor, weights: Tensor) -> _Cut:
    """A shift for each half of the group."""
    ascending, sorted_weights, order = _sorted(x, weights)
    halves = order < x.shape[0] // 2
    sums = [
        (_running(sorted_weights * ascending * half), _running(sorted_weights * half)) for half in (halves, ~halves)
    ]
    best, cuts = _Best(x[0]), _cuts(x.shape[0])
    for number, (first, second) in enumerate(cuts):
        offers = [[_of_half(*half, first, second, values) for values in (_UP, _DOWN)] for half in sums]
        for shifts in range(4):
            left, right = offers[0][shifts // 2], offers[1][shifts % 2]
            best.offer(left[0] + right[0], left[1] + right[1], 4 * number + shifts)
    return _as_cut(best, cuts, order, 4, lambda choice: torch.stack([choice % 4 >= 2, choice % 2 == 1]))


def _of_half(
    sum_x: list[Tensor], sum_w: list[Tensor], first: int, second: int, values: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """The sums over one half's three parts; the values are 1 apart, which leaves three terms of each."""
    products = sum_x[-1] * values[2] - (sum_x[first] + sum_x[second])
    low, high = values[0] * values[0] - values[1] * values[1], values[1] * values[1] - values[2] * values[2]
    return products, sum_w[-1] * values[2] * values[2] + sum_w[first] * low + sum_w[second] * high


def _as_cut(best: _Best, cuts: list[tuple[int, int]], order: Tensor, shifts: int, down: _Shifts) -> _Cut:
    choice = best.which.clamp(min=0).to(torch.int64)
    table = torch.tensor(cuts, device=order.device)[choice // shifts]
    rank = torch.arange(order.shape[0], device=order.device).unsqueeze(1)
    ascending = (rank >= table[:, 0]).to(torch.int64) + (rank >= table[:, 1]).to(torch.int64)
    levels = torch.empty_like(order).scatter_(0, order, ascending)
    turned = best.scale < 0
    return _Cut(torch.where(turned, 2 - levels, levels), down(choice) ^ turned, best.scale.abs(), best.which >= 0)


def _on_grid(x: Tensor, weights: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Vectors ``int32 [group / 8, n]`` and the scale that fits them."""
    grid, count = _grid(x.device), x.shape[0] // 8
    shape = (count, x.shape[1])

    def apart(numbers: Tensor) -> Tensor:
        return numbers.view(count, 8, -1).transpose(0, 1).reshape(8, -1)

    table = cut.down.expand(shape).reshape(-1).to(torch.int32)
    values = torch.cat([(grid.odd - 3) / 2 + _SHIFT, (grid.odd - 3) / 2 - _SHIFT], dim=1)
    index, whole = grid.find(
        grid.number(apart(cut.levels)), apart(x), apart(weights), cut.scale.repeat(count), values, table
    )
    index, whole = index.view(shape), whole.view(shape).all(0)
    q = _values(grid, index, cut.down)
    weighted = weights * q
    products, squares = total(weighted * x), total(weighted * q)
    refit = ~whole & (products > 0) & (squares > 0)
    return index, torch.where(refit, products / squares, cut.scale)


def _values(grid: Neighbours, index: Tensor, down: Tensor) -> Tensor:
    """What vectors and shifts stand for before they are scaled, ``fp32 [group, n]``."""
    levels = (grid.odd.index_select(1, index.view(-1)).view(8, *index.shape) - 3) / 2
    shifted = levels + torch.where(down, -_SHIFT, _SHIFT).expand(index.shape)
    return shifted.transpose(0, 1).reshape(-1, index.shape[1])
