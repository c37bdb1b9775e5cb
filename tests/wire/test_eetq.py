"""EETQ's wire: the order of bytes against its definition, both ways, and shapes that it can't hold."""

from __future__ import annotations

import pytest
import torch

from lowbit.algorithms import HalfAwayRows
from lowbit.core import Activation, Grouping, IntCode, QuantSpec, QuantTensor, Scale
from lowbit.errors import FormatError
from lowbit.wire import find_wire
from lowbit.wire.eetq import EetqSettings, EetqWire, from_cutlass, to_cutlass

WIRE, SETTINGS = EetqWire(), EetqSettings()
SHAPES = [(64, 64), (128, 192), (192, 64)]


def quantized(shape: tuple[int, int] = (128, 192)) -> QuantTensor:
    return HalfAwayRows().quantize(torch.randn(shape), WIRE.spec(SETTINGS))


def place(output: int, input_: int, inputs: int) -> int:
    """Where one code lies, step by step: within 16 inputs, within a tile of 64, then the exchange of bytes."""
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    column = input_ // 16 * 16 + order.index(input_ % 16)
    byte = output // 2 * 2 * inputs + column // 64 * 128 + output % 2 * 64 + column % 64
    return byte // 4 * 4 + [0, 2, 1, 3][byte % 4]


def test_every_code_lies_where_the_definition_puts_it() -> None:
    codes = torch.randint(-128, 128, (64, 128), dtype=torch.int8)
    run = to_cutlass(codes).view(torch.uint8)
    for output in range(0, 64, 7):
        for input_ in range(128):
            assert int(run[place(output, input_, 128)]) == int(codes[output, input_]) + 128


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_written_is_read_back(shape: tuple[int, int]) -> None:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(from_cutlass(to_cutlass(codes), shape), codes)
    tensor = quantized(shape)
    written = WIRE.write(SETTINGS, tensor)
    assert WIRE.read(SETTINGS, written).equal(tensor)
    layout = WIRE.expected(SETTINGS, tensor.spec, shape)
    assert {name: (tuple(value.shape), value.dtype) for name, value in written.items()} == layout
    again = WIRE.write(SETTINGS, WIRE.read(SETTINGS, written))
    assert all(torch.equal(again[name], written[name]) for name in written)


def test_the_config_is_understood_again() -> None:
    for settings in (SETTINGS, EetqSettings(("lm_head", "q_proj"))):
        assert find_wire(WIRE.config(settings)).name == "eetq"
        assert WIRE.parse(WIRE.config(settings)) == settings
    assert WIRE.config(SETTINGS) == {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": None}
    joined = WIRE.join({"a": SETTINGS, "b": SETTINGS}, ["lm_head"])
    assert joined == EetqSettings(("lm_head",))


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (32, 32), (1, 64)])
def test_shapes_that_are_not_made_of_tiles_are_refused(shape: tuple[int, int]) -> None:
    assert "64 x 64 tiles" in str(WIRE.refusal(SETTINGS, WIRE.spec(SETTINGS), shape))
    with pytest.raises(FormatError, match="64 x 64 tiles"):
        WIRE.write(SETTINGS, quantized(shape))


def test_other_weights_are_refused() -> None:
    spec = QuantSpec(IntCode(8, signed=True), Scale(torch.float32), Grouping.per_channel())
    assert "EETQ holds" in str(WIRE.refusal(SETTINGS, spec, (64, 64)))
    assert WIRE.settings_for(spec) == SETTINGS
    with pytest.raises(FormatError, match="leaves activations alone"):
        WIRE.settings_for(QuantSpec(spec.code, spec.scale, spec.grouping, activation=Activation("dynamic")))


def test_halves_are_rounded_away_from_zero_and_codes_reach_both_ends() -> None:
    weight = torch.zeros(64, 64)
    weight[0, :6] = torch.tensor([128.0, 0.5, -0.5, 1.5, -2.5, 0.49999997])
    weight[1, :2] = torch.tensor([-128.0, 127.5])
    tensor = HalfAwayRows().quantize(weight, WIRE.spec(SETTINGS))
    assert tensor.tensors["codes"][0, :6].tolist() == [127, 1, -1, 2, -3, 0]
    assert tensor.tensors["codes"][1, :2].tolist() == [-128, 127]
    assert tensor.tensors["scales"][:2, 0].tolist() == [1.0, 1.0]
    # A row of zeros: 0 / 0 compares as C compares it, and its scale makes it 0 again.
    assert tensor.tensors["codes"][2].unique().tolist() == [127]
    assert not tensor.dequantize()[2].any()
