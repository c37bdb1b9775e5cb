"""What the makers of ggml's types share: cutting rows into blocks, packing codes, refusing what can't be held."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lowbit.algorithms import kquants
from lowbit.core import pack
from lowbit.errors import PlanError

SUPER: Final = 256  # weights that share a super-scale

Parts = dict[str, Tensor]


def blocks_of(rows: Tensor, size: int) -> Tensor:
    """``[rows, in] -> [blocks, size]``."""
    return rows.reshape(-1, size)


def columns_of(rows: Tensor, size: int) -> Tensor:
    """``[rows, in] -> [size, blocks]``, contiguous: as :mod:`lowbit.algorithms.kquants` wants its groups."""
    return rows.reshape(-1, size).t().contiguous()


def packed_codes(codes: Tensor, rows: int, bits: int) -> Tensor:
    """Whole numbers in the order of the weights, packed per row."""
    flat = codes.to(torch.int8 if bits <= 7 else torch.int16).reshape(rows, -1)
    return pack(flat, bits)


def require_finite(name: str, numbers: Tensor) -> None:
    """Refuse weights, or scales made of them, that are not finite.

    Raises:
        PlanError: they are not.
    """
    if not bool(torch.isfinite(numbers.float()).all()):
        raise PlanError(f"the weight holds values that {name} can't: NaN, infinite, or too large for its scales")


def importance_weights(rows: Tensor, importance: Tensor, span: int, factor: int) -> Tensor:
    """What llama.cpp weights errors by: ``importance * sqrt(factor * mean(x²) + x²)``.

    Args:
        rows: ``fp32 [rows, in]``.
        importance: ``fp32 [in]``.
        span: over how many weights the mean goes; `in` is a multiple.

    Returns:
        ``fp32 [rows, in]``.
    """
    squares = rows * rows
    means = factor * kquants.total(columns_of(squares, span)) / span
    return importance * square_root(squares.view(-1, span) + means.unsqueeze(1)).view(rows.shape)


def square_root(x: Tensor) -> Tensor:
    """Rounded to the nearest fp32 number, as C's is; torch's own on CPUs may be the one beside it."""
    return x.double().sqrt_().float()
