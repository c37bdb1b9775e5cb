"""Weights as tiles, and tiles as sums of vectors: the arithmetic that all steps of AQLM share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_PIECE = 256


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense weight, differentiable with respect to codebooks and scales.

    In the dtype of the codebooks it has the bits of :func:`lowbit.core.reference.dequantize`.

    Args:
        codes: integers ``[out/og, in/ig, M]``, as stored or not: they are taken modulo the size of a codebook.
        codebooks: ``[M, 2**bits, og, ig]``, floating point.
        scales: one per row of tiles, of any shape.
        shape: ``(out, in)``.

    Returns:
        ``[out, in]`` of the dtype of the codebooks.
    """
    sums = sum_vectors(codes, codebooks)
    tiles = sums.view(*codes.shape[:2], *codebooks.shape[2:]) * scales.reshape(-1, 1, 1, 1)
    return tiles.transpose(1, 2).reshape(-1, codes.shape[1] * codebooks.shape[3])[: shape[0], : shape[1]]


def sum_vectors(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Tiles without their scales: ``[out/og, in/ig, og * ig]``."""
    count, size = codebooks.shape[:2]
    indices = (codes.long() & (size - 1)) + torch.arange(count, device=codes.device) * size
    vectors = codebooks.reshape(count * size, -1)
    return functional.embedding_bag(indices.flatten(0, 1), vectors, mode="sum").view(*codes.shape[:2], -1)


def to_tiles(weight: Tensor, out_group: int, in_group: int) -> Tensor:
    """``[out, in]`` as ``[out/og, in/ig, og * ig]``."""
    tiles = weight.reshape(weight.shape[0] // out_group, out_group, -1, in_group)
    return tiles.transpose(1, 2).reshape(tiles.shape[0], -1, out_group * in_group)


def from_tiles(tiles: Tensor, out_group: int, in_group: int) -> Tensor:
    """The inverse of :func:`to_tiles`."""
    parts = tiles.reshape(*tiles.shape[:2], out_group, in_group)
    return parts.transpose(1, 2).reshape(-1, tiles.shape[1] * in_group)


class IndexedSum:
    """Sums of those rows that have the same index, in an order that is always the same.

    ``index_add_`` leaves the order to chance on a GPU. Here the rows are sorted once; runs of one index are cut into
    pieces, so that many threads have something to do where there are few indices.

    Args:
        index: ``int64 [N]``, 0 to `size` - 1.
        size: how many sums there are.
    """

    def __init__(self, index: Tensor, size: int) -> None:
        self.order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=size)
        pieces = (counts + _PIECE - 1) // _PIECE
        self.starts = pieces.cumsum(0) - pieces  # the first piece of each index
        owner = torch.arange(size, device=index.device).repeat_interleave(pieces)
        self.pieces = torch.arange(len(owner), device=index.device)
        self.offsets = (counts.cumsum(0) - counts)[owner] + _PIECE * (self.pieces - self.starts[owner])

    def __call__(self, rows: Tensor) -> Tensor:
        """``[size, D]``: the sums of ``rows [N, D]``."""
        return self._whole(functional.embedding_bag(self.order, rows, self.offsets, mode="sum"))

    def of_table(self, table: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """``[size, D]``: the sums of ``weights[n] * table[places[n]]``."""
        places, weights = places[self.order], weights[self.order]
        return self._whole(
            functional.embedding_bag(places, table, self.offsets, mode="sum", per_sample_weights=weights)
        )

    def _whole(self, sums: Tensor) -> Tensor:
        return functional.embedding_bag(self.pieces, sums, self.starts, mode="sum")


def blocks_of(hessian: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal: ``[in/size, size, size]``."""
    groups = hessian.shape[0] // size
    parts = hessian.view(groups, size, groups, size)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """``[out]``: ``e H eᵀ`` of each row of ``difference [out, in]``."""
    return (difference @ hessian).mul_(difference).sum(1)
