"""AQLM's wire: every bit there and back, and what is no AQLM."""

from __future__ import annotations

import pytest
import torch

from lowbit.core import Grouping, QuantSpec, QuantTensor, Scale, VectorCode, integer_spec
from lowbit.errors import FormatError
from lowbit.wire import find_wire
from lowbit.wire.aqlm import AqlmSettings, AqlmWire, both_spellings

WIRE = AqlmWire()
CASES = [
    AqlmSettings(1, 16, 8, 1),
    AqlmSettings(2, 8, 8, 1),
    AqlmSettings(8, 8, 16, 1),
    AqlmSettings(3, 5, 4, 2),
    AqlmSettings(1, 17, 2, 4),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def weight(
    settings: AqlmSettings, shape: tuple[int, int] = (32, 48), dtype: torch.dtype = torch.float16
) -> QuantTensor:
    spec = QuantSpec(settings.code, Scale(dtype), Grouping(settings.out_group, 0), dtype=dtype, rounding="each")
    layout = spec.tensors(shape)
    codes = torch.randint(-(1 << settings.bits - 1), 1 << settings.bits - 1, layout["codes"][0])
    tensors = {
        "codes": codes.to(layout["codes"][1]),
        "codebooks": torch.randn(layout["codebooks"][0]).to(dtype),
        "scales": torch.rand(layout["scales"][0]).to(dtype),
    }
    return QuantTensor(spec, tensors, shape).validate()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", CASES)
def test_what_was_written_is_read_back(settings: AqlmSettings, dtype: torch.dtype) -> None:
    tensor = weight(settings, dtype=dtype)
    written = WIRE.write(settings, tensor)
    assert WIRE.read(settings, written).equal(tensor)
    layout = WIRE.expected(settings, tensor.spec, tensor.shape)
    assert {name: (tuple(value.shape), value.dtype) for name, value in written.items()} == layout
    assert WIRE.spelling(WIRE.settings_for(tensor.spec), tensor.spec) == tensor.spec


@pytest.mark.parametrize("settings", [*CASES, AqlmSettings(skip=("lm_head", "lm_head.weight"))])
def test_the_config_is_understood_again(settings: AqlmSettings) -> None:
    config = WIRE.config(settings)
    assert find_wire(config).name == "aqlm"
    assert WIRE.parse(config) == settings


def test_indices_are_unsigned_whatever_their_sign() -> None:
    settings = AqlmSettings(1, 8, 8, 1)
    tensor = weight(settings)
    written = WIRE.write(settings, tensor)
    wide = AqlmSettings(1, 7, 8, 1)
    halves = {**written, "codebooks": written["codebooks"][:, :128]}
    folded = {**halves, "codes": written["codes"] & 127}
    assert torch.equal(WIRE.read(wide, halves).dequantize(), WIRE.read(wide, folded).dequantize())
    assert int(written["codes"].min()) < 0
    assert torch.equal(
        tensor.dequantize(torch.float16),
        (
            written["codebooks"][0, written["codes"][..., 0].long() % 256, 0] * written["scales"].reshape(-1, 1, 1)
        ).reshape(32, 48),
    )


def test_codes_that_a_forward_transposed_are_turned_back() -> None:
    settings = AqlmSettings(2, 8, 8, 1)
    tensor = weight(settings)
    written = WIRE.write(settings, tensor)
    turned = {**written, "codes": written["codes"].transpose(0, 1).contiguous()}
    assert turned["codes"].shape == (6, 32, 2)
    assert WIRE.read(settings, turned).equal(tensor)
    other = AqlmSettings(2, 9, 8, 1)  # a forward turns 8 bits only
    odd = WIRE.write(other, weight(other))
    with pytest.raises(FormatError, match="codes: wrong shape"):
        WIRE.read(other, {**odd, "codes": odd["codes"].transpose(0, 1)})


def test_names_in_both_spellings() -> None:
    assert both_spellings(["lm_head.weight", "a.b", "lm_head"]) == ("lm_head", "lm_head.weight", "a.b", "a.b.weight")


def test_what_the_format_cannot_hold() -> None:
    settings = AqlmSettings(2, 8, 8, 2)
    assert "is not a multiple of 2 x 8" in str(WIRE.refusal(settings, weight(settings).spec, (33, 48)))
    with pytest.raises(FormatError, match="can't spell"):
        WIRE.write(settings, weight(AqlmSettings(1, 8, 8, 2)))
    with pytest.raises(FormatError, match="learned"):
        WIRE.settings_for(integer_spec(4, 32))
    with pytest.raises(FormatError, match="one layout"):
        WIRE.join({"a": settings, "b": AqlmSettings()}, [])
    assert WIRE.join({"a": settings}, ["lm_head"]).skip == ("lm_head", "lm_head.weight")
    assert VectorCode(2, 8, 2, 8) == settings.code
