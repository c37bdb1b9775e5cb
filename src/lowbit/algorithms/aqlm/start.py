"""Where AQLM begins: codebooks by k-means, each of what the ones before it leave (residual quantization)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.algorithms.aqlm.tiles import IndexedSum

_POINTS_PER_VECTOR = 32  # more say little more of where a vector has to lie
_LEAST_POINTS = 1 << 16
_CPU_NUMBERS = 1 << 22
_GPU_NUMBERS = 1 << 28


def residual_kmeans(
    points: Tensor, weights: Tensor, codebooks: int, size: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Codebooks, one after the other, of what is left of the points.

    Args:
        points: ``fp32 [N, D]``.
        weights: ``fp32 [N]``, how much each point matters.
        codebooks: how many.
        size: vectors in each.
        iterations: of Lloyd's algorithm.
        seed: of the choice of the points that vectors start at, and of those that are looked at where they are many.

    Returns:
        Codes ``int64 [N, M]`` and codebooks ``fp32 [M, size, D]``.
    """
    generator = torch.Generator().manual_seed(seed)
    left, books, codes = points, [], []
    for _ in range(codebooks):
        if len(left) <= size:
            book = torch.cat([left, left.new_zeros(size - len(left), left.shape[1])])
            code = torch.arange(len(left), device=left.device)
        else:
            book = _kmeans(left, weights, size, iterations, generator)
            code = nearest(left, book)
        left = left - book[code]
        books.append(book)
        codes.append(code)
    return torch.stack(codes, 1), torch.stack(books)


def _kmeans(points: Tensor, weights: Tensor, size: int, iterations: int, generator: torch.Generator) -> Tensor:
    most = max(_LEAST_POINTS, _POINTS_PER_VECTOR * size)
    order = torch.randperm(len(points), generator=generator).to(points.device)[:most]
    points, weights = points[order], weights[order]
    book = points[:size].clone()
    for _ in range(iterations):
        code = nearest(points, book)
        book = _centres(points, weights, code, book)
    return book


def _centres(points: Tensor, weights: Tensor, code: Tensor, book: Tensor) -> Tensor:
    """The means of the points of each vector; vectors without any go to where the error is largest."""
    weighted = torch.cat([points * weights.unsqueeze(1), weights.unsqueeze(1)], 1)
    sums = IndexedSum(code, len(book))(weighted)
    mass = sums[:, -1:]
    centres = torch.where(mass > 0, sums[:, :-1] / mass, book)
    unused = (mass.squeeze(1) <= 0).nonzero().squeeze(1)
    if len(unused):
        errors = (points - centres[code]).square().sum(1) * weights
        centres[unused] = points[errors.topk(len(unused)).indices]
    return centres


def nearest(points: Tensor, book: Tensor) -> Tensor:
    """``int64 [N]``: which of ``book [K, D]`` is nearest to each of ``points [N, D]``."""
    chunk = max(1, (_GPU_NUMBERS if points.is_cuda else _CPU_NUMBERS) // len(book))
    lengths = book.square().sum(1)
    return torch.cat([torch.addmm(lengths, part, book.t(), alpha=-2).argmin(1) for part in points.split(chunk)])
