"""Block codes as bytes: the inverse of :mod:`lowbit.core.blocks` for the types whose vectors come from a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.core.packing import pack


class BlockFields(NamedTuple):
    """What the bytes of ``n`` blocks of 256 weights say.

    Attributes:
        vectors: their numbers in the grid, ``[n, vectors]``, integers.
        signs: IQ2 and IQ3: ``[n, 32]``, a bit for each of eight weights, set where it is negative (types that store
            seven take the eighth from their parity). IQ1: 1 where the shift is down, ``[n, 8]`` per 32 weights in
            IQ1_S, ``[n, 32]`` per vector in IQ1_M.
        scales: ``[n, groups]``, whole numbers.
        super_scale: ``fp16 [n]``.
    """

    vectors: Tensor
    signs: Tensor
    scales: Tensor
    super_scale: Tensor


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8).view(len(numbers), -1)


def _low(numbers: Tensor) -> Tensor:
    return (numbers & 255).to(torch.uint8)


def _words(numbers: Tensor) -> Tensor:
    """16-bit words, little-endian."""
    return torch.stack([_low(numbers), _low(numbers >> 8)], dim=-1).flatten(1)


def _long_words(numbers: Tensor) -> Tensor:
    """32-bit words, little-endian; ``int64 [n, words]``."""
    return torch.stack([_low(numbers >> 8 * k) for k in range(4)], dim=-1).flatten(1)


def _fold(fields: Tensor, bits: int) -> Tensor:
    """Neighbours ``[n, words, k]`` as fields of one number, the first lowest."""
    shifts = bits * torch.arange(fields.shape[-1], device=fields.device)
    return (fields.to(torch.int64) << shifts).sum(-1)


def _sign_words(fields: BlockFields) -> Tensor:
    """The XXS types: four patterns of seven signs, and a scale on top."""
    return _fold(fields.signs.unflatten(1, (8, 4)) & 127, 7) | fields.scales.to(torch.int64) << 28


def _iq2_xxs(fields: BlockFields) -> list[Tensor]:
    words = _long_words(_sign_words(fields)).unflatten(1, (8, 4))
    return [torch.cat([_low(fields.vectors).unflatten(1, (8, 4)), words], dim=2).flatten(1)]


def _iq2_xs(fields: BlockFields) -> list[Tensor]:
    words = fields.vectors.to(torch.int64) | (fields.signs.to(torch.int64) & 127) << 9
    return [_words(words), pack(fields.scales.to(torch.uint8), 4)]


def _iq2_s(fields: BlockFields) -> list[Tensor]:
    high = pack(_low(fields.vectors >> 8), 2)
    return [_low(fields.vectors), fields.signs.to(torch.uint8), high, pack(fields.scales.to(torch.uint8), 4)]


def _iq3_xxs(fields: BlockFields) -> list[Tensor]:
    return [_low(fields.vectors), _long_words(_sign_words(fields))]


def _iq3_s(fields: BlockFields) -> list[Tensor]:
    high = pack(_low(fields.vectors >> 8), 1)
    return [_low(fields.vectors), high, fields.signs.to(torch.uint8), pack(fields.scales.to(torch.uint8), 4)]


def _iq1_s(fields: BlockFields) -> list[Tensor]:
    words = _fold((fields.vectors >> 8).unflatten(1, (8, 4)), 3)
    words = words | fields.scales.to(torch.int64) << 12 | fields.signs.to(torch.int64) << 15
    return [_low(fields.vectors), _words(words)]


def _iq1_m(fields: BlockFields) -> list[Tensor]:
    high = (fields.vectors >> 8).to(torch.int64) | fields.signs.to(torch.int64) << 3
    words = _fold(fields.scales.unflatten(1, (4, 4)), 3)
    # Each word holds four bits of the block's scale on top.
    scale = fields.super_scale.contiguous().view(torch.int16).to(torch.int64).unsqueeze(1) & 0xFFFF
    nibbles = scale >> 4 * torch.arange(4, device=scale.device) & 15
    return [_low(fields.vectors), pack(high.to(torch.uint8), 4), _words(words | nibbles << 12)]


_ENCODERS: Final[dict[str, Callable[[BlockFields], list[Tensor]]]] = {
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
}


def encode_blocks(name: str, fields: BlockFields) -> Tensor:
    """The bytes of block codes.

    Args:
        name: of :data:`lowbit.core.blocks.FORMATS`; not of the ternary ones, which have no grid.
        fields: of ``n`` blocks.

    Returns:
        ``uint8 [n, bytes per block]``.
    """
    parts = _ENCODERS[name](fields)
    if name != "iq1_m":
        parts.insert(0, _bytes(fields.super_scale.unsqueeze(1)))
    return torch.cat(parts, dim=1)
