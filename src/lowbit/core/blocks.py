"""Block codes: weights whose bytes stay as they are stored, a block at a time, scales inside (ggml's lattice types).

Three families. IQ2 and IQ3: eight (four) magnitudes at once, a row of a fixed grid of vectors, and their signs apart.
IQ1: the same with -1, 0, 1 and a shift of an eighth. TQ: numbers -1, 0, 1, five to a byte in base 3 or four in base 4.
Every product here is exact in fp32, so their order can't matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.core.packing import pack, packed_bytes, unpack

_CHUNK: Final = 1 << 13  # blocks decoded at once: their intermediate numbers take a few dozen MB
_DELTA: Final = 0.125


class Grid(NamedTuple):
    """Vectors that block codes point to.

    Attributes:
        vectors: how many.
        size: of a vector.
        values: what its packed entries stand for.
    """

    vectors: int
    size: int
    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.vectors * self.size, self.bits)


# In the order in which ggml_grids.bin holds them.
GRIDS: Final[dict[str, Grid]] = {
    "iq1_s": Grid(2048, 8, (-1, 0, 1)),
    "iq2_xxs": Grid(256, 8, (8, 25, 43)),
    "iq2_xs": Grid(512, 8, (8, 25, 43)),
    "iq2_s": Grid(1024, 8, (8, 25, 43)),
    "iq3_xxs": Grid(256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3_s": Grid(512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
}


def pack_grid(grid: Grid, values: Tensor) -> bytes:
    """``[vectors, size]`` of a grid's values as :func:`_grid` reads them from the file."""
    levels = torch.tensor(grid.values, dtype=torch.float32)
    return bytes(pack(torch.bucketize(values.float().reshape(-1), levels), grid.bits).tolist())


@functools.cache
def _grid(name: str, device: torch.device) -> Tensor:
    """The vectors of a grid, ``fp32 [vectors, size]``."""
    start = 0
    for other, grid in GRIDS.items():
        if other == name:
            break
        start += grid.nbytes
    grid = GRIDS[name]
    stored = (Path(__file__).parent / "ggml_grids.bin").read_bytes()[start : start + grid.nbytes]
    codes = unpack(torch.frombuffer(bytearray(stored), dtype=torch.uint8), grid.bits, grid.vectors * grid.size)
    values = torch.tensor(grid.values, dtype=torch.float32)[codes.to(torch.int64)]
    return values.view(grid.vectors, grid.size).to(device)


@functools.cache
def grid_levels(name: str, device: torch.device) -> Tensor:
    """Which of :attr:`Grid.values` each entry of a grid's vectors is, ``int64 [vectors, size]``."""
    values = torch.tensor(GRIDS[name].values, dtype=torch.float32, device=device)
    return torch.bucketize(_grid(name, device), values)


@functools.cache
def _signs(count: int, device: torch.device) -> Tensor:
    """``fp32 [count, 8]``, -1 where a bit is set. Of 128 the eighth sign makes the number of minuses even."""
    numbers = torch.arange(count, dtype=torch.uint8)
    bits = unpack(numbers.unsqueeze(1), 1, 8)
    if count == 128:
        bits[:, 7] = bits.sum(1) % 2
    return (1.0 - 2.0 * bits.float()).to(device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table` by ``index [...]``: ``[..., size]``."""
    return table.index_select(0, index.reshape(-1).to(torch.int32)).view(*index.shape, table.shape[1])


def _aligned(stored: Tensor) -> Tensor:
    """A copy: a slice of blocks may begin at any byte, and words can't."""
    return stored.clone(memory_format=torch.contiguous_format)


def _half(stored: Tensor) -> Tensor:
    """Two bytes per block as the fp16 number that they are: ``[n, 2] -> [n, 1]``."""
    return _aligned(stored).view(torch.float16)


def _words(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as little-endian words, in int32 (a 32-bit word's top bit becomes its sign)."""
    words = _aligned(stored).view(dtype).to(torch.int32)
    return words & 0xFFFF if dtype == torch.int16 else words


def _nibbles(stored: Tensor) -> Tensor:
    """Low and high nibble of each byte, in this order."""
    return unpack(stored.contiguous(), 4, 2 * stored.shape[-1])


def _scaled(scale: Tensor, vectors: Tensor) -> Tensor:
    """``[n, groups]`` times ``[n, vectors, size]``, consecutive vectors sharing a scale; flat per block."""
    groups = vectors.reshape(*scale.shape, -1)
    return (groups * scale.unsqueeze(-1)).reshape(scale.shape[0], -1)


def _word_parts(words: Tensor) -> tuple[Tensor, Tensor]:
    """A 32-bit word of the XXS types: four 7-bit sign patterns, and a 4-bit scale on top."""
    patterns = torch.stack([words >> 7 * k & 127 for k in range(4)], dim=-1).flatten(1)
    return patterns, (words >> 28 & 15).float()


def _iq2_xxs(blocks: Tensor) -> Tensor:
    pairs = _words(blocks[:, 2:], torch.int32).view(len(blocks), 8, 2)
    index = blocks[:, 2:].unflatten(1, (8, 8))[..., :4].flatten(1)
    patterns, scale = _word_parts(pairs[..., 1])
    vectors = _look_up(_grid("iq2_xxs", blocks.device), index) * _look_up(_signs(128, blocks.device), patterns)
    return _scaled(_half(blocks[:, :2]).float() * (scale + 0.5) * 0.25, vectors)


def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _words(blocks[:, 2:66], torch.int16)
    scale = _nibbles(blocks[:, 66:]).float()
    vectors = _look_up(_grid("iq2_xs", blocks.device), words & 511)
    vectors = vectors * _look_up(_signs(128, blocks.device), words >> 9)
    return _scaled(_half(blocks[:, :2]).float() * (scale + 0.5) * 0.25, vectors)


def _iq2_s(blocks: Tensor) -> Tensor:
    high = unpack(blocks[:, 66:74].contiguous(), 2, 32).to(torch.int32)
    scale = _nibbles(blocks[:, 74:]).float()
    vectors = _look_up(_grid("iq2_s", blocks.device), blocks[:, 2:34].to(torch.int32) | high << 8)
    vectors = vectors * _look_up(_signs(256, blocks.device), blocks[:, 34:66])
    return _scaled(_half(blocks[:, :2]).float() * (scale + 0.5) * 0.25, vectors)


def _iq3_xxs(blocks: Tensor) -> Tensor:
    patterns, scale = _word_parts(_words(blocks[:, 66:], torch.int32))
    vectors = _look_up(_grid("iq3_xxs", blocks.device), blocks[:, 2:66]).view(len(blocks), 32, 8)
    vectors = vectors * _look_up(_signs(128, blocks.device), patterns)
    return _scaled(_half(blocks[:, :2]).float() * (scale + 0.5) * 0.5, vectors)


def _iq3_s(blocks: Tensor) -> Tensor:
    high = unpack(blocks[:, 66:74].contiguous(), 1, 64).to(torch.int32)
    vectors = _look_up(_grid("iq3_s", blocks.device), blocks[:, 2:66].to(torch.int32) | high << 8)
    vectors = vectors.view(len(blocks), 32, 8) * _look_up(_signs(256, blocks.device), blocks[:, 74:106])
    scale = _nibbles(blocks[:, 106:]).float()
    return _scaled(_half(blocks[:, :2]).float() * (2 * scale + 1), vectors)


def _iq1_s(blocks: Tensor) -> Tensor:
    words = _words(blocks[:, 34:], torch.int16)
    high = torch.stack([words >> 3 * k & 7 for k in range(4)], dim=-1).flatten(1)
    vectors = _look_up(_grid("iq1_s", blocks.device), blocks[:, 2:34].to(torch.int32) | high << 8)
    shift = torch.where(words >> 15 == 1, -_DELTA, _DELTA)
    scale = _half(blocks[:, :2]).float() * (2 * (words >> 12 & 7) + 1)
    return _scaled(scale, vectors.reshape(len(blocks), 8, 32) + shift.unsqueeze(-1))


def _iq1_m(blocks: Tensor) -> Tensor:
    high = _nibbles(blocks[:, 32:48]).to(torch.int32)
    vectors = _look_up(_grid("iq1_s", blocks.device), blocks[:, :32].to(torch.int32) | (high & 7) << 8)
    vectors = vectors + torch.where(high >> 3 == 1, -_DELTA, _DELTA).unsqueeze(-1)
    words = _words(blocks[:, 48:], torch.int16)
    scale = torch.stack([words >> 3 * k & 7 for k in range(4)], dim=-1).flatten(1)
    return _scaled(_scattered_half(blocks).float() * (2 * scale + 1), vectors)


def _scattered_half(blocks: Tensor) -> Tensor:
    """IQ1_M's fp16 scale, of which each of the last four words holds 4 bits on top; ``fp16 [n, 1]``."""
    tops = _words(blocks[:, 48:], torch.int16) >> 12
    low = (tops[:, 0::2] | tops[:, 1::2] << 4).to(torch.uint8)
    return _half(low)


def _tq1_0(blocks: Tensor) -> Tensor:
    # A byte holds round-up(n * 256 / 243) of a number n of five digits in base 3, so that times 3 moves the first
    # digit above the byte.
    parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    rows = [stored * 3**digit for stored, digits in parts for digit in range(digits)]  # modulo 256
    digits = torch.cat(rows, dim=1).to(torch.int16) * 3 >> 8
    return (digits - 1).float() * _half(blocks[:, 52:]).float()


def _tq2_0(blocks: Tensor) -> Tensor:
    stored = blocks[:, :64].unflatten(1, (2, 1, 32))
    digits = torch.cat([stored >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    return (digits.to(torch.int8) - 1).float() * _half(blocks[:, 64:]).float()


class BlockFormat(NamedTuple):
    """How a block is decoded.

    Attributes:
        elements: weights in a block.
        nbytes: bytes of a block.
        decode: ``uint8 [n, nbytes] -> fp32 [n, elements]``.
        scale: ``uint8 [n, nbytes] -> fp16 [n, 1]``, the scale of the whole block.
    """

    elements: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]


def _first_two(blocks: Tensor) -> Tensor:
    return _half(blocks[:, :2])


def _last_two(blocks: Tensor) -> Tensor:
    return _half(blocks[:, -2:])


FORMATS: Final[dict[str, BlockFormat]] = {
    "iq1_s": BlockFormat(256, 50, _iq1_s, _first_two),
    "iq1_m": BlockFormat(256, 56, _iq1_m, _scattered_half),
    "iq2_xxs": BlockFormat(256, 66, _iq2_xxs, _first_two),
    "iq2_xs": BlockFormat(256, 74, _iq2_xs, _first_two),
    "iq2_s": BlockFormat(256, 82, _iq2_s, _first_two),
    "iq3_xxs": BlockFormat(256, 98, _iq3_xxs, _first_two),
    "iq3_s": BlockFormat(256, 110, _iq3_s, _first_two),
    "tq1_0": BlockFormat(256, 54, _tq1_0, _last_two),
    "tq2_0": BlockFormat(256, 66, _tq2_0, _last_two),
}


def decode_blocks(name: str, blocks: Tensor) -> Tensor:
    """The weights of block codes.

    Args:
        name: of :data:`FORMATS`.
        blocks: ``uint8 [out, blocks per row, bytes per block]``.

    Returns:
        ``fp32 [out, in]``.
    """
    kind = FORMATS[name]
    flat = blocks.reshape(-1, kind.nbytes)
    values = torch.empty(flat.shape[0], kind.elements, dtype=torch.float32, device=blocks.device)
    for stored, part in zip(flat.split(_CHUNK), values.split(_CHUNK), strict=True):
        part.copy_(kind.decode(stored))
    return values.view(blocks.shape[0], blocks.shape[1] * kind.elements)


def block_scales(name: str, blocks: Tensor) -> Tensor:
    """The scale of each block, ``fp16 [out * blocks per row, 1]``; what has to be finite in a valid weight."""
    kind = FORMATS[name]
    return kind.scale(blocks.reshape(-1, kind.nbytes))
