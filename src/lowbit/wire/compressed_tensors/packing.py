"""Codes and zero points between the wire's tensors and the spec's.

The library thinks in signed integers and stores ``q + 2**(bits-1)`` where it packs, q itself in an int8 where it
doesn't. Specs with a zero point are unsigned (``q + 2**(bits-1)`` again, and so the zero points), those without are
signed. 32-bit words are a dense bit stream; older versions put ``32 // bits`` values into a word and left the rest of
its bits 0, which is the same at 1, 2, 4 and 8 bits.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.core import pack, packed_bytes, unpack
from lowbit.core.packing import sign_extend
from lowbit.errors import FormatError
from lowbit.wire.base import as_bytes, as_words

_STRIP: Final = 1 << 20  # values that are unpacked at a time


def words_of(count: int, bits: int) -> int:
    """How many words `count` values take."""
    return -(-count * bits // 32)


def padded_words_of(count: int, bits: int) -> int:
    """How many words they took in older versions."""
    return -(-count // (32 // bits))


def to_stream(name: str, words: Tensor, count: int, bits: int) -> Tensor:
    """``int32 [rows, words]`` of either packing to a dense stream ``uint8 [rows, packed_bytes(count, bits)]``.

    Raises:
        FormatError: the words are too few or too many, or a bit is set that belongs to no value.
    """
    dense, padded = words_of(count, bits), padded_words_of(count, bits)
    if words.shape[-1] not in (dense, padded):
        expected = f"{dense} words" if dense == padded else f"{dense} words, or {padded} where words are padded"
        raise FormatError(
            f"{count} values of {bits} bits don't fill it", tensor=name, found=list(words.shape), expected=expected
        )
    loose = words.shape[-1] == padded and (padded != dense or (_spills(words, count, bits) and 32 % bits))
    if loose:
        strips = words.split(max(1, _STRIP // count))  # so that loading takes no more memory than the weight
        return torch.cat([pack(_unpad(name, strip, count, bits), bits) for strip in strips])
    if _spills(words, count, bits):
        raise FormatError(f"bits are set behind the last of {count} values", tensor=name)
    return as_bytes(words)[..., : packed_bytes(count, bits)].contiguous()


def to_words(stream: Tensor) -> Tensor:
    """The inverse, densely packed."""
    return as_words(functional.pad(stream, (0, -stream.shape[-1] % 4)))


def flip_sign(stream: Tensor, count: int, bits: int) -> Tensor:
    """Packed codes between unsigned and two's complement: the highest bit of each is turned over."""
    row = torch.full((count,), 1 << bits - 1, dtype=torch.uint8, device=stream.device)
    return stream ^ pack(row, bits)


def from_int8(name: str, values: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Signed values ``int8 [rows, n]``, one to a byte, to the spec's codes or zero points.

    Raises:
        FormatError: a value is out of the range of `bits` bits.
    """
    half = 1 << bits - 1
    if bits < 8 and values.numel():
        low, high = int(values.min()), int(values.max())
        if low < -half or high >= half:
            raise FormatError("a value is out of range", tensor=name, found=f"{low}..{high}",
                              expected=f"{-half}..{half - 1}")  # fmt: skip
    if bits == 8:
        return values.contiguous() if signed else values.contiguous().view(torch.uint8) ^ 0x80
    return pack(values if signed else values + half, bits)


def to_int8(stored: Tensor, count: int, bits: int, *, signed: bool) -> Tensor:
    """The inverse of :func:`from_int8`."""
    if bits == 8:
        return stored if signed else (stored ^ 0x80).view(torch.int8)
    values = unpack(stored, bits, count)
    return sign_extend(values, bits) if signed else values.view(torch.int8) - (1 << bits - 1)


def read_packed_zeros(words: Tensor, outputs: int, bits: int) -> Tensor:
    """Zero points packed along the output axis, ``int32 [words, groups]``, to the spec's."""
    stream = to_stream("weight_zero_point", words.t().contiguous(), outputs, bits)
    return pack(unpack(stream, bits, outputs).t(), bits)


def write_packed_zeros(zeros: Tensor, groups: int, bits: int) -> Tensor:
    """The inverse of :func:`read_packed_zeros`."""
    return to_words(pack(unpack(zeros, bits, groups).t(), bits)).t().contiguous()


def _spills(words: Tensor, count: int, bits: int) -> bool:
    """Whether a bit is set behind the last value of a dense stream."""
    used = count * bits - 32 * (words.shape[-1] - 1)
    return used < 32 and bool(((words[..., -1].to(torch.int64) & 0xFFFFFFFF) >> used).any())


def _unpad(name: str, words: Tensor, count: int, bits: int) -> Tensor:
    """The values of the older packing, uint8 ``[rows, count]``."""
    per_word = 32 // bits
    wide = words.to(torch.int64) & 0xFFFFFFFF
    shifts = torch.arange(0, per_word * bits, bits, device=words.device)
    values = (wide.unsqueeze(-1) >> shifts & ((1 << bits) - 1)).flatten(-2)
    if bool((wide >> per_word * bits).any()) or bool(values[..., count:].any()):
        raise FormatError(f"bits are set that belong to none of {count} padded values", tensor=name)
    return values[..., :count].to(torch.uint8)
