"""The searches behind ggml's quantizers: scales (and mins) that fit a group best, by trying a few and solving for each.

For a candidate scale the codes are fixed by rounding, and given the codes the best scale is a weighted least-squares
fit; the candidate with the least error stays. Groups lie in columns, ``fp32 [size, groups]``, and sums run down a
column one element after the other, as in ggml's reference code: fp32 sums depend on their order, and so do the bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EPSILON = 1e-15  # groups that stay below are all zeros


class Affine(NamedTuple):
    """``x ~ scale * code - minimum`` per group; `codes` are those of the search, before scales are rounded."""

    scale: Tensor
    minimum: Tensor
    codes: Tensor


class Linear(NamedTuple):
    """``x ~ scale * code`` per group, codes from ``-levels`` to ``levels - 1``."""

    scale: Tensor
    codes: Tensor


def total(terms: Tensor) -> Tensor:
    """The sum of each column, first to last, in fp32."""
    result = terms[0].clone()
    for term in terms[1:]:
        result += term
    return result


def fp32(value: float) -> float:
    """The nearest fp32 number: constants are rounded before they are used."""
    return float(torch.tensor(value, dtype=torch.float32))


def ratio(number: float, x: Tensor) -> Tensor:
    """``number / x``, and 0 where x is 0. A number divided by a tensor would be multiplied with its reciprocal."""
    return torch.where(x == 0, 0, torch.tensor(number, dtype=x.dtype) / x)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The element of the greatest magnitude of each column (the first of several), with its sign; and its magnitude."""
    magnitude = x.abs()
    index = magnitude.argmax(dim=0, keepdim=True)
    return x.gather(0, index)[0], magnitude.gather(0, index)[0]


def search_affine(x: Tensor, weights: Tensor, top: int, candidates: list[float], *, absolute: bool) -> Affine:
    """Scale and min of codes ``0 .. top``; the min is at most 0.

    Args:
        candidates: what is added to `top` before it is divided by the range; each gives one candidate scale.
        absolute: the error is the weighted sum of absolute differences, else of squares.
    """
    high = x.amax(0)
    low = x.amin(0).clamp(max=0)
    flat = high == low
    sum_w, sum_x = total(weights), total(weights * x)
    steps = ratio(top, high - low)
    base = low
    scale = ratio(1, steps)
    best = _error(x, weights, _affine_codes(x, base, steps, top), scale, low, absolute)
    best_steps, best_base = steps, base
    for candidate in candidates:
        tried = ratio(fp32(candidate + top), high - low)
        codes = _affine_codes(x, low, tried, top)
        new_scale, new_low, solved = _solve(x, weights, codes, sum_w, sum_x)
        error = _error(x, weights, codes, new_scale, new_low, absolute)
        better = solved & ~flat & (error < best)
        best_steps, best_base = torch.where(better, tried, best_steps), torch.where(better, low, best_base)
        best = torch.where(better, error, best)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
    return Affine(scale, -low, _affine_codes(x, best_base, best_steps, top))


def _affine_codes(x: Tensor, low: Tensor, steps: Tensor, top: int) -> Tensor:
    return ((x - low) * steps).round_().clamp_(0, top)


def _error(x: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, low: Tensor, absolute: bool) -> Tensor:
    difference = (codes * scale).add_(low).sub_(x)
    return total((difference.abs_() if absolute else difference.square_()).mul_(weights))


def _solve(x: Tensor, weights: Tensor, codes: Tensor, sum_w: Tensor, sum_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scale and min of least squares for given codes, and where there is a solution."""
    weighted = weights * codes
    sum_l, sum_xl = total(weighted), total(weighted * x)
    sum_l2 = total(weighted.mul_(codes))
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = low > 0
    scale = torch.where(positive, sum_xl / sum_l2, scale)
    return scale, low.masked_fill(positive, 0), determinant > 0


def search_linear(x: Tensor, levels: int, weights: Tensor | None = None) -> Linear:
    """The scale of codes ``-levels .. levels - 1``, errors weighted (by ``x * x`` if not said); nineteen candidates."""
    extreme, magnitude = largest(x)
    empty = magnitude < _EPSILON
    weights = x * x if weights is None else weights
    weighted = weights * x
    best_steps = ratio(-levels, extreme).masked_fill(empty, 0)
    scale, best = _fit(x, weights, weighted, best_steps, levels)[:2]
    for number in (*range(-9, 0), *range(1, 10)):
        steps = ratio(-fp32(levels + fp32(fp32(0.1) * number)), extreme).masked_fill(empty, 0)
        new_scale, gain, products, squares = _fit(x, weights, weighted, steps, levels)
        better = (squares > 0) & (products * products > best * squares)
        best_steps = torch.where(better, steps, best_steps)
        scale, best = torch.where(better, new_scale, scale), torch.where(better, gain, best)
    codes = _linear_codes(x, best_steps, levels)
    return Linear(scale.masked_fill(empty, 0), codes.masked_fill(empty, -levels))


def _linear_codes(x: Tensor, steps: Tensor, levels: int) -> Tensor:
    return (x * steps).round_().clamp_(-levels, levels - 1)


def _fit(
    x: Tensor, weights: Tensor, weighted: Tensor, steps: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale by least squares, what it gains, and the sums of products and squares that it is made of."""
    codes = _linear_codes(x, steps, levels)
    products = total(weighted * codes)
    squares = total((weights * codes).mul_(codes))
    scale = torch.where(squares == 0, 0, products / squares)
    return scale, scale * products, products, squares


def descend_linear(x: Tensor, levels: int, rounds: int = 5) -> Linear:
    """As :func:`search_linear`, but from the first candidate code by code: each is set to what fits the others best."""
    extreme, magnitude = largest(x)
    empty = magnitude < _EPSILON
    steps = ratio(-levels, extreme).masked_fill(empty, 0)
    codes = _linear_codes(x, steps, levels)
    weights = x * x
    weighted = weights * x
    products = total(weighted * codes)
    squares = total(weights * codes * codes)
    for _ in range(rounds):
        changed = torch.zeros((), dtype=torch.bool, device=x.device)
        for number in range(x.shape[0]):
            moved = _improve(x[number], weights[number], weighted[number], codes[number], products, squares, levels)
            changed |= moved.any()
        if not bool(changed):
            break
    scale = torch.where(squares > 0, products / squares, 0)
    return Linear(scale.masked_fill(empty, 0), codes.masked_fill(empty, -levels))


def _improve(
    x: Tensor, weight: Tensor, weighted: Tensor, code: Tensor, products: Tensor, squares: Tensor, levels: int
) -> Tensor:
    """Set one code of each group anew where that gains; updates code and sums in place, returns where."""
    other_products = products - weighted * code
    other_squares = squares - weight * code * code
    new = _nearest(x * other_squares / other_products).clamp_(-levels, levels - 1)
    new_products = other_products + weighted * new
    new_squares = other_squares + weight * new * new
    better = (other_products > 0) & (new != code) & (new_squares > 0)
    better &= new_products * new_products * squares > products * products * new_squares
    code.copy_(torch.where(better, new, code))
    products.copy_(torch.where(better, new_products, products))
    squares.copy_(torch.where(better, new_squares, squares))
    return better


def search_positive(x: Tensor, weights: Tensor, top: int, rounds: int = 5) -> Linear:
    """The scale of codes ``0 .. top`` for numbers that are not negative: nine candidates, then code by code.

    A few negative numbers do no harm: their codes are stored as bytes, and sums are made of what is stored, as in ggml.
    """
    high = x.amax(0).clamp(min=0)
    empty = high < _EPSILON
    steps = ratio(top, high).masked_fill(empty, 0)
    codes = torch.remainder((x * steps).round_(), 256)
    best = _positive_error(x, weights, codes, ratio(1, steps))
    for number in (*range(-4, 0), *range(1, 5)):
        tried = ratio(fp32(fp32(fp32(0.1) * number) + top), high).masked_fill(empty, 0)
        error = _positive_error(x, weights, (x * tried).round_().clamp_(max=top), ratio(1, tried))
        better = error < best
        best, steps = torch.where(better, error, best), torch.where(better, tried, steps)
    codes = (x * steps).round_().clamp_(max=top)
    weighted = weights * x
    products, squares = total(weighted * codes), total((weights * codes).mul_(codes))
    codes = torch.remainder(codes, 256)
    for _ in range(rounds):
        changed = torch.zeros((), dtype=torch.bool, device=x.device)
        for number in range(x.shape[0]):
            changed |= _improve_positive(x[number], weights[number], codes[number], products, squares, top).any()
        if not bool(changed):
            break
    scale = torch.where(squares > 0, products / squares, 0)
    return Linear(scale.masked_fill(empty, 0), codes.masked_fill(empty, 0))


def _positive_error(x: Tensor, weights: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    difference = x - scale * codes
    return total((weights * difference).mul_(difference))


def _improve_positive(x: Tensor, weight: Tensor, code: Tensor, products: Tensor, squares: Tensor, top: int) -> Tensor:
    """Set one code of each group anew where that gains; updates code and sums in place, returns where."""
    other_products = products - weight * x * code
    other_squares = squares - weight * code * code
    new = _nearest(x * other_squares / other_products).clamp_(max=top)
    new_products = other_products + weight * x * new
    new_squares = other_squares + weight * new * new
    better = (other_products > 0) & (other_squares > 0) & (new != code)
    better &= new_products * new_products * squares > products * products * new_squares
    code.copy_(torch.where(better, torch.remainder(new, 256), code))
    products.copy_(torch.where(better, new_products, products))
    squares.copy_(torch.where(better, new_squares, squares))
    return better


def _nearest(x: Tensor) -> Tensor:
    """Round to nearest even as ggml does, by adding 1.5 * 2**23; numbers past 2**22 become the same as there."""
    return (((x + 12582912.0).view(torch.int32) & 0x7FFFFF) - 0x400000).float()


def nearest_entry(x: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest of ascending whole numbers up to 127, the upper one of two; ``uint8``."""
    return _look_up(x, _halves(table)[0])


def _halves(table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry of each multiple of 1/2 from -128 to 127.5, its index and its value.

    The border between two whole numbers is a multiple of 1/2, so that all numbers from one to the next share an entry.
    """
    steps = torch.arange(-256, 256, device=table.device) / 2
    index = torch.bucketize(steps, (table[1:] + table[:-1]) / 2, right=True)
    return index.to(torch.uint8), table[index]


def _look_up(x: Tensor, halves: Tensor) -> Tensor:
    steps = (x * 2).floor_().clamp_(-256, 255).to(torch.int32).add_(256)
    return halves.index_select(0, steps.view(-1)).view(x.shape)


def search_table(x: Tensor, table: Tensor, tries: int, weights: Tensor | None = None) -> Tensor:
    """The scale of a table's values, errors weighted (by ``x * x`` if not said); ``2 * tries + 2`` candidates."""
    extreme, magnitude = largest(x)
    empty = magnitude < _EPSILON
    first = float(table[0])
    weights, values = x * x if weights is None else weights, _halves(table)[1]
    steps = ratio(1, -extreme / first).masked_fill(empty, 0)
    products, squares = _fit_table(x, weights, steps, values)
    scale = torch.where(squares > 0, products / squares, 0)
    best = scale * products
    for number in range(-tries, tries + 1):
        steps = ratio(number + first, extreme).masked_fill(empty, 0)
        products, squares = _fit_table(x, weights, steps, values)
        better = (squares > 0) & (products * products > best * squares)
        scale = torch.where(better, products / squares, scale)
        best = torch.where(better, scale * products, best)
    return scale.masked_fill(empty, 0)


def _fit_table(x: Tensor, weights: Tensor, steps: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    values = _look_up(x * steps, halves)
    weighted = weights * values
    return total(weighted * x), total(weighted.mul_(values))
