"""How GGUF lays codes into bytes: bit planes, and the packed sub-scales of each K-quant.

A run of `width` bytes holds the low bits of `width` consecutive weights, above them those of the next `width`, and so
on: low nibbles are the first half of a block, high nibbles the second. Width 1 is a plain stream of bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take_apart(stored: Tensor, bits: int, width: int) -> Tensor:
    """``uint8 [..., n] -> uint8 [..., n * 8 / bits]``, in the order of the weights."""
    runs = stored.unflatten(-1, (-1, width))
    mask = (1 << bits) - 1
    return torch.stack([runs >> shift & mask for shift in range(0, 8, bits)], dim=-2).flatten(-3)


def put_together(values: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of :func:`take_apart`."""
    fields = values.unflatten(-1, (-1, 8 // bits, width)).unbind(-2)
    stored = fields[0].clone()
    for number, field in enumerate(fields[1:], start=1):
        stored |= field << number * bits
    return stored.flatten(-2)


def nibbles_to_stream(stored: Tensor, width: int) -> Tensor:
    """Runs of low, then high nibbles as neighbours in one byte, without taking them apart: 4-bit codes as lowbit packs
    them. The shape stays.
    """
    runs = stored.unflatten(-1, (-1, width))
    even, odd = runs[..., 0::2], runs[..., 1::2]
    return torch.cat([even & 15 | odd << 4, even >> 4 | odd & 0xF0], dim=-1).flatten(-2)


def stream_to_nibbles(packed: Tensor, width: int) -> Tensor:
    """The inverse of :func:`nibbles_to_stream`."""
    runs = packed.unflatten(-1, (-1, width))
    low, high = runs[..., : width // 2], runs[..., width // 2 :]
    return torch.stack([low & 15 | high << 4, low >> 4 | high & 0xF0], dim=-1).flatten(-3)


def read_scales_k4(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: 12 bytes of eight 6-bit scales and eight 6-bit mins.

    Bytes 0-3 and 4-7 hold the first four of each, with the top two bits of the last four above them; bytes 8-11 the low
    nibbles of the last four scales, above them those of the mins.
    """
    scales, mins, mixed = stored[..., 0:4], stored[..., 4:8], stored[..., 8:12]
    return (
        torch.cat([scales & 63, mixed & 15 | scales >> 2 & 48], dim=-1),
        torch.cat([mins & 63, mixed >> 4 | mins >> 2 & 48], dim=-1),
    )


def write_scales_k4(scales: Tensor, mins: Tensor) -> Tensor:
    """The inverse of :func:`read_scales_k4`."""
    first_scales, last_scales = scales.chunk(2, dim=-1)
    first_mins, last_mins = mins.chunk(2, dim=-1)
    return torch.cat(
        [
            first_scales | last_scales >> 4 << 6,
            first_mins | last_mins >> 4 << 6,
            last_scales & 15 | (last_mins & 15) << 4,
        ],
        dim=-1,
    )


def read_scales_k3(stored: Tensor) -> Tensor:
    """Q3_K: 12 bytes of sixteen 6-bit scales, 32 more than they stand for; read as two's complement of 6 bits.

    Eight bytes of low nibbles, then four whose pairs of bits are the tops of scales 0-3, 4-7, 8-11 and 12-15.
    """
    scales = take_apart(stored[..., :8], 4, 8) | take_apart(stored[..., 8:], 2, 4) << 4
    return scales ^ 32


def write_scales_k3(scales: Tensor) -> Tensor:
    """The inverse of :func:`read_scales_k3`."""
    scales = (scales & 63) ^ 32
    return torch.cat([put_together(scales & 15, 4, 8), put_together(scales >> 4, 2, 4)], dim=-1)


def read_scales_xs(high: Tensor, low: Tensor) -> Tensor:
    """IQ4_XS: eight 6-bit scales, 32 more than they stand for: low nibbles in four bytes, tops in two."""
    scales = take_apart(low, 4, 1) | take_apart(high, 2, 1) << 4
    return scales ^ 32


def write_scales_xs(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`read_scales_xs`: ``high, low``."""
    scales = (scales & 63) ^ 32
    return put_together(scales >> 4, 2, 1), put_together(scales & 15, 4, 1)
