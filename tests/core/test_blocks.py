"""Block codes: one block of each kind worked out by hand, and what the spec says of them."""

from __future__ import annotations

import pytest
import torch

from lowbit.core import BlockCode, Grouping, QuantSpec, QuantTensor, Scale
from lowbit.core.blocks import FORMATS, GRIDS, _grid, block_scales, decode_blocks, pack_grid
from lowbit.errors import SpecError

ONE, TWO = 0x3C00, 0x4000  # in fp16


def spec_of(name: str) -> QuantSpec:
    code = BlockCode(name)
    return QuantSpec(code, Scale(torch.float32, stored=False), Grouping.groups(code.elements), dtype=torch.float32)


def test_grids_are_packed_and_unpacked() -> None:
    for name, grid in GRIDS.items():
        values = _grid(name, torch.device("cpu"))
        assert tuple(values.shape) == (grid.vectors, grid.size)
        assert sorted(values.unique().tolist()) == sorted(grid.values)
        assert len(values.unique(dim=0)) == grid.vectors
        assert len(pack_grid(grid, values)) == grid.nbytes


def test_digits_in_base_3_and_4() -> None:
    digits = torch.tensor([2, 0, 1, 1])  # minus one each
    ternary = torch.zeros(1, 1, 54, dtype=torch.uint8)
    ternary[0, 0, 0] = ((2 * 81 + 0 * 27 + 1 * 9 + 1 * 3 + 2) * 256 + 242) // 243
    ternary[0, 0, 53] = TWO >> 8
    weights = decode_blocks("tq1_0", ternary)[0]
    assert weights[:160:32].tolist() == [2, -2, 0, 0, 2]
    quaternary = torch.zeros(1, 1, 66, dtype=torch.uint8)
    quaternary[0, 0, 33] = int((digits * torch.tensor([1, 4, 16, 64])).sum())
    quaternary[0, 0, 65] = ONE >> 8
    assert decode_blocks("tq2_0", quaternary)[0, 129::32].tolist() == [1, -1, 0, 0]


def test_signs_scales_and_vectors() -> None:
    block = torch.zeros(1, 1, 66, dtype=torch.uint8)
    block[0, 0, 1] = ONE >> 8
    block[0, 0, 2] = 1  # the first vector's index
    block[0, 0, 6] = 0b101  # two signs, which make an even number
    block[0, 0, 9] = 3 << 4  # the scale of the first 32 weights
    grid = _grid("iq2_xxs", torch.device("cpu"))
    scale = (0.5 + 3) * 0.25
    signs = torch.tensor([-1.0, 1, -1, 1, 1, 1, 1, 1])
    weights = decode_blocks("iq2_xxs", block)[0]
    assert torch.equal(weights[:8], grid[1] * signs * scale)
    assert torch.equal(weights[8:16], grid[0] * scale) and torch.equal(weights[32:40], grid[0] * 0.125)
    block[0, 0, 6] = 1  # one sign: the eighth makes it two
    assert decode_blocks("iq2_xxs", block)[0, 7] == -weights[7]


def test_a_scale_scattered_over_words() -> None:
    block = torch.zeros(1, 1, 56, dtype=torch.uint8)
    for word in range(4):
        block[0, 0, 49 + 2 * word] = (0x3555 >> 4 * word & 15) << 4
    assert block_scales("iq1_m", block).view(torch.int16).tolist() == [[0x3555]]


def test_a_weight_stays_packed_and_decodes() -> None:
    spec = spec_of("iq3_s")
    assert spec.tensors((4, 512)) == {"codes": ((4, 2, 110), torch.uint8)}
    assert (spec.bits, str(spec)) == (3, "iq3_s, groups of 256")
    assert QuantSpec.from_json(spec.to_json()) == spec
    codes = torch.zeros(4, 2, 110, dtype=torch.uint8)
    codes[..., 1] = ONE >> 8
    tensor = QuantTensor(spec, {"codes": codes}, (4, 512)).validate()
    assert tensor.bits_per_weight == 3.4375
    assert tensor.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(tensor.dequantize(), _grid("iq3_s", torch.device("cpu"))[0].repeat(4, 128))


def test_many_blocks_are_decoded_in_pieces() -> None:
    codes = torch.randint(0, 256, (20000, 1, 66), dtype=torch.uint8)
    codes[..., 64:] = torch.tensor([0, 0x3C], dtype=torch.uint8)
    whole = decode_blocks("tq2_0", codes)
    assert torch.equal(whole[-3:], decode_blocks("tq2_0", codes[-3:]))


def test_unknown_blocks_are_refused() -> None:
    with pytest.raises(SpecError, match="a block code is one of"):
        BlockCode("iq9")
    assert all(kind.elements == 256 for kind in FORMATS.values())
