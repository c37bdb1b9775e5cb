"""Block codes from their fields: what decoding gives is what the fields say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.core.block_encoding import BlockFields, encode_blocks
from lowbit.core.blocks import FORMATS, GRIDS, block_scales, decode_blocks, grid_levels

# (grid, groups, factor of the scale); a block's groups share its vectors evenly.
TYPES = {
    "iq1_s": ("iq1_s", 8, 2.0),
    "iq1_m": ("iq1_s", 16, 2.0),
    "iq2_xxs": ("iq2_xxs", 8, 0.25),
    "iq2_xs": ("iq2_xs", 16, 0.25),
    "iq2_s": ("iq2_s", 16, 0.25),
    "iq3_xxs": ("iq3_xxs", 8, 0.5),
    "iq3_s": ("iq3_s", 8, 2.0),
}
EVEN = ("iq2_xxs", "iq2_xs", "iq3_xxs")


def random_fields(name: str, blocks: int) -> BlockFields:
    grid, groups, _ = TYPES[name]
    ternary = name.startswith("iq1")
    signs = torch.randint(0, 2 if ternary else 256, (blocks, 8 if name == "iq1_s" else 32))
    if name in EVEN:
        ones = sum(signs >> bit & 1 for bit in range(8))
        signs = signs ^ (ones % 2 << 7)
    return BlockFields(
        torch.randint(0, GRIDS[grid].vectors, (blocks, 256 // GRIDS[grid].size)),
        signs,
        torch.randint(0, 8 if ternary else 16, (blocks, groups)).to(torch.uint8),
        torch.randn(blocks).half(),
    )


def meaning(name: str, fields: BlockFields) -> Tensor:
    """``[blocks, 256]``, straight from what the fields stand for."""
    grid, groups, factor = TYPES[name]
    values = torch.tensor(GRIDS[grid].values)[grid_levels(grid, torch.device("cpu"))]
    numbers = values[fields.vectors].flatten(1)
    if name.startswith("iq1"):
        shifts = 0.125 - 0.25 * fields.signs.float()
        numbers = numbers + shifts.repeat_interleave(256 // shifts.shape[1], dim=1)
    else:
        bits = torch.stack([fields.signs >> bit & 1 for bit in range(8)], dim=-1).flatten(1)
        numbers = numbers * (1 - 2 * bits)
    scales = fields.super_scale.float().unsqueeze(1) * (fields.scales + 0.5) * factor
    return numbers * scales.repeat_interleave(256 // groups, dim=1)


@pytest.mark.parametrize("name", TYPES)
def test_blocks_decode_to_what_their_fields_say(name: str) -> None:
    fields = random_fields(name, 50)
    codes = encode_blocks(name, fields)
    assert tuple(codes.shape) == (50, FORMATS[name].nbytes) and codes.dtype == torch.uint8
    assert torch.equal(block_scales(name, codes.unsqueeze(0))[:, 0], fields.super_scale)
    decoded = decode_blocks(name, codes.unsqueeze(0)).view(50, 256)
    # Products of the same few factors in another order: each rounds once at most.
    assert bool(((decoded - meaning(name, fields)).abs() <= 2e-7 * decoded.abs()).all())


@pytest.mark.parametrize("name", GRIDS)
def test_levels_of_a_grid_are_places_among_its_values(name: str) -> None:
    levels = grid_levels(name, torch.device("cpu"))
    assert tuple(levels.shape) == (GRIDS[name].vectors, GRIDS[name].size)
    assert sorted(levels.unique().tolist()) == list(range(len(GRIDS[name].values)))
    assert len(levels.unique(dim=0)) == GRIDS[name].vectors
