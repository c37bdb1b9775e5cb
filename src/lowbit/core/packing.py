"""Dense bit streams: b-bit integers along the last axis, least significant bit first, no padding between them.

Read as little-endian 32-bit words this is also the order in which GPTQ packs 2, 3, 4 and 8 bits, so those wires are a
transpose away from ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError

_CHUNK = 8  # the fewest b-bit values that always fill whole bytes: 8 values are b bytes


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
    values = (values.to(torch.int16) & ((1 << bits) - 1)).to(torch.uint8)
    if bits == 8:
        return values.contiguous()
    if 8 % bits == 0:
        return _fold(values, bits)[..., : packed_bytes(count, bits)].contiguous()
    words = _pad(values, _CHUNK).unflatten(-1, (-1, _CHUNK)).to(torch.int64)
    joined = (words << _steps(_CHUNK, bits, words.device)).sum(-1)
    stream = (joined.unsqueeze(-1) >> _steps(bits, 8, words.device)) & 0xFF
    return stream.to(torch.uint8).flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


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
    words = _pad(packed, bits).unflatten(-1, (-1, bits)).to(torch.int64)
    joined = (words << _steps(bits, 8, words.device)).sum(-1)
    fields = (joined.unsqueeze(-1) >> _steps(_CHUNK, bits, words.device)) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(-2)[..., :count]


def sign_extend(values: Tensor, bits: int) -> Tensor:
    """Read unsigned `bits`-bit fields (uint8) as two's complement; returns int8 of the same shape."""
    shift = 8 - bits
    return (values << shift).view(torch.int8) >> shift


def _fold(values: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    fields = _pad(values, per_byte).unflatten(-1, (-1, per_byte))
    return (fields << _steps(per_byte, bits, values.device).to(torch.uint8)).sum(-1, dtype=torch.uint8)


def _pad(values: Tensor, multiple: int) -> Tensor:
    missing = -values.shape[-1] % multiple
    return functional.pad(values, (0, missing)) if missing else values


def _steps(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise SpecError(f"bits must be 1 to 8, not {bits}")
