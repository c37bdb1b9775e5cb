"""The best codebooks and scales for codes that are given: least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.algorithms.aqlm.tiles import IndexedSum, blocks_of, from_tiles, sum_vectors, to_tiles

_RIDGE = 1e-6  # of a block's mean diagonal, so that vectors that are used once or never have an inverse


def fitted_scales(weight: Tensor, hessian: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``fp32 [out/og]``: for each row of tiles the scale of the least error; the present one where any is as good."""
    out_group, in_group = codebooks.shape[2:]
    sums = from_tiles(sum_vectors(codes, codebooks), out_group, in_group)
    turned = sums @ hessian
    wanted = (turned * weight).sum(1).view(-1, out_group).sum(1)
    length = (turned * sums).sum(1).view(-1, out_group).sum(1)
    return torch.where(length > 0, wanted / length, scales)


def fitted_codebooks(
    weight: Tensor, hessian: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, steps: int
) -> Tensor:
    """Codebooks of a lesser error, by steps of preconditioned conjugate gradients from the present ones.

    The error is quadratic in the vectors. Its matrix, which has ``M K og ig`` rows, is never formed: it is applied by
    decoding, multiplying with the Hessian and summing up what belongs to each vector. The preconditioner is the inverse
    of its blocks of one vector each.

    Args:
        weight: ``fp32 [out, in]``.
        hessian: ``fp32 [in, in]``.
        codes: ``int64 [out/og, in/ig, M]``.
        codebooks: ``fp32 [M, K, og, ig]``.
        scales: ``fp32 [out/og]``.
        steps: at most so many.

    Returns:
        Like `codebooks`.
    """
    system = _System(hessian, codes, codebooks, scales)
    solution = codebooks.clone()
    residual = system.gather((weight - system.decode(solution)) @ hessian)
    preconditioned = system.precondition(residual)
    direction = preconditioned
    product = (residual * preconditioned).sum()
    first = float(product)
    for _ in range(steps):
        turned = system.gather(system.decode(direction) @ hessian)
        curvature = (direction * turned).sum()
        if float(curvature) <= 0 or float(product) <= 1e-8 * first:
            break
        step = product / curvature
        solution += step * direction
        residual -= step * turned
        preconditioned = system.precondition(residual)
        before, product = product, (residual * preconditioned).sum()
        direction = preconditioned + (product / before) * direction
    return solution


class _System:
    """The quadratic form of the codebooks, as two linear maps and a preconditioner."""

    def __init__(self, hessian: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
        self.shape, self.codes, self.scales = codebooks.shape, codes, scales
        # One sum for each codebook: in all at once, sums of many rows would stand beside each other in memory.
        self.sums = [IndexedSum(code, codebooks.shape[1]) for code in codes.flatten(0, 1).unbind(1)]
        self.inverse = self._inverse(blocks_of(hessian, self.shape[3]))

    def decode(self, codebooks: Tensor) -> Tensor:
        """``[out, in]``: the weight that codebooks give."""
        tiles = sum_vectors(self.codes, codebooks) * self.scales.view(-1, 1, 1)
        return from_tiles(tiles, self.shape[2], self.shape[3])

    def gather(self, gradient: Tensor) -> Tensor:
        """The transpose of :meth:`decode`."""
        tiles = to_tiles(gradient, self.shape[2], self.shape[3]) * self.scales.view(-1, 1, 1)
        rows = tiles.flatten(0, 1)
        return torch.stack([summed(rows) for summed in self.sums]).view(self.shape)

    def precondition(self, gradient: Tensor) -> Tensor:
        """The gradient of each vector times the inverse of the vector's own block."""
        return (gradient.view(-1, *self.shape[2:]) @ self.inverse).view(self.shape)

    def _inverse(self, blocks: Tensor) -> Tensor:
        """``[M * K, ig, ig]``: a vector's own block is the sum of the Hessian's blocks where it is used."""
        rows, groups, _ = self.codes.shape
        places = torch.arange(groups, device=blocks.device).repeat(rows)
        squares = self.scales.square().repeat_interleave(groups)
        table = blocks.flatten(1)
        own = torch.cat([summed.of_table(table, places, squares) for summed in self.sums])
        matrices = own.view(-1, self.shape[3], self.shape[3])
        mean = matrices.diagonal(dim1=1, dim2=2).mean(1)
        ridge = _RIDGE * torch.where(mean > 0, mean, mean.max())
        matrices.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        inverse: Tensor = torch.linalg.inv(matrices)
        return inverse
