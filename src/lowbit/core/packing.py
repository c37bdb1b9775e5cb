"""Dense bit streams: b-bit integers along the last axis, least significant bit first, no padding between them.

Read as little-endian 32-bit words this is also the order in which GPTQ packs 2, 3, 4 and 8 bits, so those wires are a
transpose away from ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` values of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers into a dense bit stream along the last axis.

    Args:
        values: integers of any dtype, ``[..., n]``; only the low `bits` bits of each are kept, so negative numbers
            are stored as their two's complement.
        bits: width of one value, 1 to 8.

    Returns:
        ``uint8 [..., ceil(n * bits / 8)]``. Unused bits of the last byte are zero.
    """
    _check_bits(bits)
    count = values.shape[-1]
    wide = values if values.dtype == torch.uint8 else values.to(torch.int16)
    values = (wide & ((1 << bits) - 1)).to(torch.uint8)
    if bits == 8:
        return values.contiguous()
    per_run = _run(bits)
    fields = _pad(values, per_run).unflatten(-1, (-1, per_run)).unbind(-1)
    stream = torch.stack([_byte(fields, bits, number) for number in range(per_run * bits // 8)], dim=-1)
    return stream.flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        packed: ``uint8 [..., ceil(count * bits / 8)]``.
        bits: width of one value, 1 to 8.
        count: how many values the last axis holds.

    Returns:
        ``uint8 [..., count]``, unsigned.
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise SpecError(f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.shape[-1]}")
    if bits == 8:
        return packed
    if 8 % bits == 0:
        fields = [packed >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(fields, dim=-1).flatten(-2)[..., :count]
    per_run = _run(bits)
    run_bytes = per_run * bits // 8
    stream = _pad(packed, run_bytes).unflatten(-1, (-1, run_bytes)).unbind(-1)
    return torch.stack([_value(stream, bits, number) for number in range(per_run)], dim=-1).flatten(-2)[..., :count]


def sign_extend(values: Tensor, bits: int) -> Tensor:
    """Read unsigned `bits`-bit fields (uint8) as two's complement; returns int8 of the same shape."""
    shift = 8 - bits
    return (values << shift).view(torch.int8) >> shift


def _run(bits: int) -> int:
    """The fewest values that fill whole bytes."""
    return 8 // math.gcd(bits, 8)


def _byte(fields: tuple[Tensor, ...], bits: int, number: int) -> Tensor:
    """One byte of a run from the values that have bits in it; bytes are enough, what is shifted out is elsewhere."""
    start = 8 * number
    byte: Tensor | None = None
    for index in range(start // bits, (start + 7) // bits + 1):
        shift = index * bits - start
        part = fields[index] << shift if shift >= 0 else fields[index] >> -shift
        byte = part if byte is None else byte | part
    return fields[0] if byte is None else byte


def _value(stream: tuple[Tensor, ...], bits: int, number: int) -> Tensor:
    """One value of a run from the one or two bytes that it lies in."""
    first, shift = divmod(number * bits, 8)
    value = stream[first] >> shift
    if shift + bits > 8:
        value = value | stream[first + 1] << 8 - shift
    return value & ((1 << bits) - 1)


def _pad(values: Tensor, multiple: int) -> Tensor:
    missing = -values.shape[-1] % multiple
    return functional.pad(values, (0, missing)) if missing else values


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise SpecError(f"bits must be 1 to 8, not {bits}")
