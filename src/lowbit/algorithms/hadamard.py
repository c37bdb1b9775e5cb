"""Orthogonal matrices that spread every coordinate over all: Hadamard matrices with random signs, of any size.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. Sylvester's exist for powers of two and need no product to
apply; Paley's (J. Math. Phys. 12, 1933) for ``q + 1`` and ``2 (q + 1)`` with q a prime power. A size n is split into a
power of two and a factor of one of these orders; where none divides n, the factor is a random orthogonal matrix. Signs
come from a seed (QuaRot, arXiv:2404.00456).
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from lowbit.errors import PlanError

_LARGEST_FACTOR: Final = 1024


class Rotation:
    """An orthogonal matrix ``Q [n, n]``, applied without being written out.

    Args:
        size: n.
        seed: of the signs, and of the random factor where there is one; it decides Q on every device.
        centred: whether ``Q 1 = 1`` for the vector of ones: such a Q keeps means, and so commutes with what subtracts
            the mean (LayerNorm).

    Attributes:
        factor: ``fp64 [m, m]``, orthogonal, its first row constant; n is m times a power of two.
        known: whether the factor is a Hadamard matrix, so that all entries of a Q that isn't centred are equally large.

    Raises:
        PlanError: the size is not positive.
    """

    def __init__(self, size: int, seed: int = 0, *, centred: bool = False) -> None:
        if size < 1:
            raise PlanError(f"a rotation has a positive size, not {size}")
        self.size, self.seed, self.centred = size, seed, centred
        generator = torch.Generator().manual_seed(seed)
        self.signs = (torch.randint(2, (size,), generator=generator) * 2 - 1).double()
        if centred:
            self.signs[0] = 1
        order = _factor_order(size)
        self.known = order is not None
        odd = size // (size & -size)
        self.factor = hadamard(order) / order**0.5 if order is not None else _random_factor(odd, generator)

    def apply(self, tensor: Tensor, axis: int = -1) -> Tensor:
        """``x Q`` along an axis of length n; in fp64 for fp64 and in fp32 for everything else."""
        rows, signs = self._rows(tensor, axis)
        if self.centred:
            return self._spread(self._gather(rows) * signs).movedim(-1, axis)
        return self._spread(rows * signs).movedim(-1, axis)

    def undo(self, tensor: Tensor, axis: int = -1) -> Tensor:
        """``x Qᵀ``, the inverse of :meth:`apply`."""
        if self.centred:
            return self.apply(tensor, axis)  # B' D B, which is symmetric
        rows, signs = self._rows(tensor, axis)
        return (self._gather(rows) * signs).movedim(-1, axis)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``Q [n, n]``."""
        return self.apply(torch.eye(self.size, dtype=torch.float64)).to(dtype)

    def _rows(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        if tensor.shape[axis] != self.size:
            raise PlanError(f"a rotation of {self.size} can't turn {tensor.shape[axis]} channels")
        work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        rows = tensor.movedim(axis, -1).to(work)
        return rows, self.signs.to(rows)

    def _spread(self, rows: Tensor) -> Tensor:
        """``x B`` with ``B`` the Kronecker product of Sylvester's matrix and the factor."""
        return self._kronecker(rows, self.factor.to(rows))

    def _gather(self, rows: Tensor) -> Tensor:
        """``x Bᵀ``."""
        return self._kronecker(rows, self.factor.t().to(rows))

    def _kronecker(self, rows: Tensor, factor: Tensor) -> Tensor:
        split = rows.unflatten(-1, (-1, len(factor)))
        return (_walsh(split) @ factor).flatten(-2)


def _walsh(split: Tensor) -> Tensor:
    """Sylvester's matrix, orthonormal, over the axis before the last, whose length is a power of two."""
    length, half = split.shape[-2], 1
    while half < length:
        pairs = split.unflatten(-2, (-1, 2, half))
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        split = torch.stack([first + second, first - second], -3).flatten(-4, -2)
        half *= 2
    return split / length**0.5


@functools.lru_cache(maxsize=64)
def hadamard(order: int) -> Tensor:
    """A Hadamard matrix whose first row is all ones.

    Returns:
        ``fp64 [order, order]`` of 1 and -1; to be read only.

    Raises:
        PlanError: none is known here: the order is neither a power of two nor one of Paley's, with a prime or, for
            his second construction, the square of one.
    """
    if order & (order - 1) == 0 and order > 0:
        matrix = _walsh(torch.eye(order, dtype=torch.float64).unsqueeze(-1)).squeeze(-1) * order**0.5
    elif order % 4 == 0 and _is_prime(order - 1):
        matrix = _paley(order - 1)
    elif order % 4 == 0 and _conference(order // 2 - 1):
        matrix = _doubled_paley(order // 2 - 1)
    else:
        raise PlanError(f"no Hadamard matrix of order {order} is known here")
    return (matrix * matrix[:1]).round()


def _paley(q: int) -> Tensor:
    """Order ``q + 1``, for a prime q of remainder 3 by 4."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _residues(q)
    matrix[1:, 1:] += torch.eye(q, dtype=torch.float64)
    return matrix


def _doubled_paley(q: int) -> Tensor:
    """Order ``2 (q + 1)``, for a q of remainder 1 by 4."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _residues(q)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), turned)


def _residues(q: int) -> Tensor:
    """``[q, q]``: whether the difference of two elements of the field of q is a square: 1, -1, or 0 for the same."""
    root = round(q**0.5)
    prime = root if root * root == q else q
    numbers = torch.arange(q)
    # The field of p² is a + b w with w² a number that is no square in the field of p; in a field of primes b is 0.
    high, low = numbers // prime, numbers % prime
    squares = {value * value % prime for value in range(prime)}
    no_square = next(value for value in range(prime) if value not in squares)
    is_square = torch.zeros(q, dtype=torch.bool)
    is_square[2 * low * high % prime * prime + (low * low + no_square * high * high) % prime] = True
    difference = (high[:, None] - high) % prime * prime + (low[:, None] - low) % prime
    return torch.where(difference == 0, 0.0, torch.where(is_square[difference], 1.0, -1.0)).double()


def _conference(q: int) -> bool:
    """Whether Paley's second construction takes q: a prime of remainder 1 by 4, or the square of an odd prime."""
    root = round(q**0.5) if q > 0 else 0
    return (q % 4 == 1 and _is_prime(q)) or (root % 2 == 1 and root * root == q and _is_prime(root))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _factor_order(size: int) -> int | None:
    """The least order of a known Hadamard matrix of which `size` is a power of two times; None where there is none."""
    order = size // (size & -size)
    if order == 1:
        return 1
    while order <= _LARGEST_FACTOR and size % order == 0:
        if order % 4 == 0 and (_is_prime(order - 1) or _conference(order // 2 - 1)):
            return order
        order *= 2
    return None


def _random_factor(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix whose first row is constant."""
    start = torch.randn(size, size, generator=generator, dtype=torch.float64)
    start[:, 0] = 1
    orthogonal, triangle = torch.linalg.qr(start)
    return (orthogonal * triangle.diagonal().sign()).t().contiguous()
