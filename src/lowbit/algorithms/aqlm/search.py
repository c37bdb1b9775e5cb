"""Which vectors to add up: beam searches for the codes of AQLM, over all rows at once.

The error of a row, ``(w - v) H (w - v)ᵀ``, is with ``H = U Uᵀ``, U upper triangular, the squared length of
``(w - v) U``, of which the part that belongs to a group of columns depends on this group and those before it. So the
groups are decided from left to right, and each decision costs exactly what it adds to the error if all later columns
could still be anything: GPTQ's way to round (LDLQ in arXiv:2307.13304), with vectors for numbers. The beam keeps the
best few beginnings of each row (:func:`sequential_codes`). Afterwards each tile is decided again with the rest of its
row fixed (:func:`revised_codes`), which never makes the error larger. The paper's search keeps several whole rows there
instead of several sums per tile, which takes longer and found codes of a larger error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.aqlm.tiles import blocks_of, from_tiles, sum_vectors, to_tiles

_CPU_NUMBERS = 1 << 22  # scores at a time: what fits into a cache is quickest
_GPU_NUMBERS = 1 << 28
_STRICTLY = 1 - 1e-6  # an error that is smaller by less is the same error


@dataclass
class Hypotheses:
    """For each of N tiles the best B ways that were found to write it.

    Attributes:
        costs: ``[N, B]``: the squared length of what is left, and of what the beginning of the row cost.
        parents: ``int64 [N, B]``: which beginning of the row it follows.
        codes: ``int64 [N, B, M]``.
        left: ``[N, B, D]``: the target less the vectors.
    """

    costs: Tensor
    parents: Tensor
    codes: Tensor
    left: Tensor

    def keep(self, which: Tensor) -> Hypotheses:
        """Those at the places ``which [N, B']``."""
        return Hypotheses(
            self.costs.gather(1, which),
            self.parents.gather(1, which),
            _pick(self.codes, which),
            _pick(self.left, which),
        )


def sequential_codes(weight: Tensor, factor: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes chosen from the first group of columns to the last, each with the errors before it in view.

    Args:
        weight: ``fp32 [out, in]``, divided by its scales.
        factor: ``fp32 [in, in]``, upper triangular: U of ``H = U Uᵀ``.
        codebooks: ``fp32 [M, K, og, ig]``.
        beam: how many beginnings of a row are kept.

    Returns:
        ``int64 [out/og, in/ig, M]``.
    """
    rows = weight.shape[0] // codebooks.shape[2]
    target = (weight @ factor).view(rows, 1, codebooks.shape[2], -1)
    chunk = _rows_at_once(weight, beam * max(codebooks.shape[1], codebooks.shape[2] * weight.shape[1]))
    return torch.cat([_sequential(part, factor, codebooks, beam) for part in target.split(chunk)])


def _sequential(left: Tensor, factor: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes for the targets ``left [R, 1, og, in]``."""
    count, size, out_group, in_group = codebooks.shape
    rows, groups = left.shape[0], left.shape[3] // in_group
    costs = left.new_zeros(rows, 1)
    codes = torch.zeros(rows, 1, groups, count, dtype=torch.int64, device=left.device)
    for group in range(groups):
        columns = slice(group * in_group, (group + 1) * in_group)
        vectors = (codebooks @ factor[columns, columns]).view(count, size, -1)
        found = _search(left[..., columns].flatten(2), costs, vectors, beam)
        costs, codes = found.costs, _pick(codes, found.parents)
        codes[:, :, group] = found.codes
        chosen = _vectors(codebooks, found.codes).view(rows, -1, out_group, in_group)
        left = _pick(left, found.parents)
        later = slice(columns.stop, None)
        left[..., later] -= chosen @ factor[columns, later]
    best = costs.argmin(1, keepdim=True)
    return _pick(codes, best).squeeze(1)


def revised_codes(weight: Tensor, hessian: Tensor, codebooks: Tensor, codes: Tensor, beam: int) -> Tensor:
    """Each tile's codes, chosen anew with the rest of the row as it is.

    Args:
        weight: ``fp32 [out, in]``, divided by its scales.
        hessian: ``fp32 [in, in]``, positive definite.
        codebooks: ``fp32 [M, K, og, ig]``.
        codes: ``int64 [out/og, in/ig, M]``, the present ones.
        beam: how many sums of vectors are kept while one is built.

    Returns:
        Codes like `codes`, of an error that is nowhere larger.
    """
    out_group = codebooks.shape[2]
    chunk = _rows_at_once(weight, (beam + 1) * max(codebooks.shape[1], out_group * weight.shape[1]))
    parts = zip(weight.split(chunk * out_group), codes.split(chunk), strict=True)
    return torch.cat([_revised(rows, hessian, codebooks, present, beam) for rows, present in parts])


def _revised(weight: Tensor, hessian: Tensor, codebooks: Tensor, codes: Tensor, beam: int) -> Tensor:
    count, size, out_group, in_group = codebooks.shape
    blocks = blocks_of(hessian, in_group)
    factors = torch.linalg.cholesky(blocks)
    tiles, sums = to_tiles(weight, out_group, in_group), sum_vectors(codes, codebooks)
    gradient = from_tiles(tiles - sums, out_group, in_group) @ hessian
    codes, rows = codes.clone(), codes.shape[0]
    for group in range(codes.shape[1]):
        columns, factor = slice(group * in_group, (group + 1) * in_group), factors[group]
        tile, present = (part[:, group].reshape(-1, in_group) for part in (tiles, sums))
        others = gradient[:, columns] - (tile - present) @ blocks[group]
        # The best tile, were it not for the codebooks: w + others H_gg⁻¹. Lengths are measured with H_gg = P Pᵀ.
        shift = torch.linalg.solve_triangular(factor, others.t(), upper=False).t()
        target = (tile @ factor + shift).view(rows, 1, -1)
        chosen = _improved(target, codes[:, group], (codebooks @ factor).view(count, size, -1), beam)
        codes[:, group] = chosen
        gradient -= (_vectors(codebooks, chosen).view(-1, in_group) - present) @ hessian[columns]
    return codes


def _improved(target: Tensor, codes: Tensor, vectors: Tensor, beam: int) -> Tensor:
    """The best codes ``[R, M]`` for ``target [R, 1, D]``: the present ones, unless others are truly better."""
    left = target - _vectors(vectors, codes).unsqueeze(1)
    present = Hypotheses(left.square().sum(-1), torch.zeros_like(codes[:, :1]), codes.unsqueeze(1), left)
    every = [present, _search(target, torch.zeros_like(present.costs), vectors, beam)]
    if len(vectors) > 1:
        every.append(_refined(present, vectors))
    costs = torch.cat([one.costs for one in every], 1)
    best = costs.argmin(1, keepdim=True)
    better = costs.gather(1, best) < present.costs * _STRICTLY
    return torch.where(better, _pick(torch.cat([one.codes for one in every], 1), best).squeeze(1), codes)


def _search(targets: Tensor, costs: Tensor, vectors: Tensor, beam: int) -> Hypotheses:
    """Sums of vectors near ``targets [N, B, D]``, of which each has cost something already.

    Vector after vector is added; then each is exchanged once more with the others as they are.
    """
    found = _added(targets, costs, vectors, beam)
    return found if len(vectors) == 1 else _different(_refined(found, vectors))


def _added(targets: Tensor, costs: Tensor, vectors: Tensor, beam: int) -> Hypotheses:
    rows, width, _ = targets.shape
    parents = torch.arange(width, device=targets.device).expand(rows, width)
    codes = torch.empty(rows, width, 0, dtype=torch.int64, device=targets.device)
    found = Hypotheses(costs + targets.square().sum(-1), parents, codes, targets)
    size = vectors.shape[1]
    for book in vectors:
        scores = _distances(found.left, book) + found.costs.unsqueeze(-1)
        place = _least(scores.flatten(1), beam)
        code = place % size
        found = found.keep(place // size)
        found.left = found.left - book[code]
        found.codes = torch.cat([found.codes, code.unsqueeze(-1)], -1)
        start = costs.gather(1, found.parents)
        found.costs = start + found.left.square().sum(-1)
    return found


def _refined(found: Hypotheses, vectors: Tensor) -> Hypotheses:
    start = found.costs - found.left.square().sum(-1)
    codes, left = found.codes.clone(), found.left
    for index, book in enumerate(vectors):
        without = left + book[codes[..., index]]
        codes[..., index] = _distances(without, book).argmin(-1)
        left = without - book[codes[..., index]]
    return Hypotheses(start + left.square().sum(-1), found.parents, codes, left)


def _different(found: Hypotheses) -> Hypotheses:
    """The same, where what stands there twice is infinitely bad the second time."""
    every = torch.cat([found.parents.unsqueeze(-1), found.codes], -1)
    same = (every.unsqueeze(1) == every.unsqueeze(2)).all(-1)
    found.costs = found.costs.masked_fill(same.tril(-1).any(-1), torch.inf)
    return found


def _distances(points: Tensor, book: Tensor) -> Tensor:
    """``[..., K]``: squared distances of points ``[..., D]`` to vectors ``[K, D]``, less the points' own lengths."""
    scores = torch.addmm(book.square().sum(-1), points.flatten(0, -2), book.t(), alpha=-2)
    return scores.view(*points.shape[:-1], -1)


def _least(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` least scores of each row."""
    if count == 1:
        return scores.argmin(1, keepdim=True)
    return scores.topk(min(count, scores.shape[1]), largest=False, sorted=False).indices


def _vectors(codebooks: Tensor, codes: Tensor) -> Tensor:
    """``[..., D]``: the sums that codes ``[..., M]`` stand for."""
    books = codebooks.flatten(2)
    total = books[0][codes[..., 0]]
    for index in range(1, len(books)):
        total = total + books[index][codes[..., index]]
    return total


def _pick(values: Tensor, which: Tensor) -> Tensor:
    """``values [N, B, ...]`` at the places ``which [N, B']`` of the second axis."""
    index = which.view(*which.shape, *(1,) * (values.dim() - 2)).expand(*which.shape, *values.shape[2:])
    return values.gather(1, index)


def _rows_at_once(like: Tensor, numbers: int) -> int:
    return max(1, (_GPU_NUMBERS if like.is_cuda else _CPU_NUMBERS) // numbers)
