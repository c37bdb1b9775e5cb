"""AQLM files and configs that are wrong: one error that says what and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.core import Grouping, QuantSpec, QuantTensor, Scale
from lowbit.errors import FormatError
from lowbit.wire.aqlm import AqlmSettings, AqlmWire

WIRE = AqlmWire()
SETTINGS = AqlmSettings(2, 8, 8, 1)
SHAPE = (16, 64)


def stored(settings: AqlmSettings = SETTINGS) -> dict[str, torch.Tensor]:
    layout = WIRE.expected(settings, WIRE.spec(settings), SHAPE)
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}


@pytest.mark.parametrize("value", [0, 33, -1, "8", 8.0, True, 25, 2**40, [8]])
@pytest.mark.parametrize("name", ["nbits_per_codebook", "num_codebooks", "in_group_size", "out_group_size"])
def test_config_values_out_of_range(name: str, value: Any) -> None:
    if name != "nbits_per_codebook" and type(value) is int and 0 < value < 100:
        assert WIRE.parse({name: value})
        return
    with pytest.raises(FormatError, match=f"quantization_config.{name}"):
        WIRE.parse({name: value})


@pytest.mark.parametrize("value", ["lm_head", [3], {"lm_head": 1}, 7])
def test_names_that_are_none(value: Any) -> None:
    with pytest.raises(FormatError, match="linear_weights_not_to_quantize is not a list"):
        WIRE.parse({"linear_weights_not_to_quantize": value})


def test_more_vectors_than_an_index_reaches() -> None:
    with pytest.raises(FormatError, match="num_codebooks is out of range"):
        WIRE.parse({"nbits_per_codebook": 24, "num_codebooks": 128})


@pytest.mark.parametrize("name", ["codes", "codebooks", "scales"])
def test_a_missing_tensor(name: str) -> None:
    tensors = stored()
    del tensors[name]
    with pytest.raises(FormatError, match=f"{name}: a quantized weight lacks a tensor"):
        WIRE.read(SETTINGS, tensors)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("codebooks", (2, 255, 1, 8), "codebooks: wrong shape"),
        ("codebooks", (1, 256, 1, 8), "codebooks: wrong shape"),
        ("codebooks", (2, 256, 8, 1), "codebooks: wrong shape"),
        ("codebooks", (2, 256, 8), "codebooks: wrong number of dimensions"),
        ("codes", (16, 8), "codes: wrong number of dimensions"),
        ("codes", (16, 8, 1), "codes: wrong shape"),
        ("codes", (15, 8, 2), "codes: wrong shape"),
        ("scales", (16,), "scales: wrong number of dimensions"),
        ("scales", (15, 1, 1, 1), "codes: wrong shape"),
        ("scales", (16, 8, 1, 1), "scales: wrong shape"),
        ("scales", (0, 1, 1, 1), "scales: has no element"),
    ],
)
def test_inconsistent_codebooks_codes_and_scales(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        WIRE.read(SETTINGS, stored() | {name: torch.zeros(shape, dtype=stored()[name].dtype)})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("codes", torch.int16),
        ("codes", torch.uint8),
        ("codes", torch.float16),
        ("codebooks", torch.int8),
        ("codebooks", torch.float64),
        ("codebooks", torch.float32),
        ("scales", torch.bfloat16),
    ],
)
def test_wrong_dtypes(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match="wrong dtype"):
        WIRE.read(SETTINGS, stored() | {name: stored()[name].to(dtype)})


@given(st.integers(1, 10), st.integers(1, 4), st.integers(0, 2**31))
def test_no_code_is_past_the_codebook(bits: int, codebooks: int, seed: int) -> None:
    """Whatever bits a file holds, the indices are taken modulo the codebook's size: nothing is read outside of it."""
    settings = AqlmSettings(codebooks, bits, 4, 2)
    random = torch.Generator().manual_seed(seed)
    tensors = stored(settings)
    limits = torch.iinfo(tensors["codes"].dtype)
    tensors["codes"].copy_(torch.randint(limits.min, limits.max + 1, tensors["codes"].shape, generator=random))
    tensors["codebooks"].copy_(torch.randn(tensors["codebooks"].shape, generator=random))
    tensors["scales"].fill_(1)
    dense = WIRE.read(settings, tensors).dequantize(torch.float16)
    most = tensors["codebooks"].float().abs().amax() * codebooks
    assert dense.shape == SHAPE and float(dense.abs().max()) <= float(most) * 1.01


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 6e-8])
def test_scales_of_any_value_are_what_they_are(value: float) -> None:
    tensors = stored()
    tensors["codebooks"].fill_(1)
    tensors["scales"].fill_(value)
    dense = WIRE.read(SETTINGS, tensors).dequantize(torch.float16)
    assert torch.equal(dense.isnan(), torch.full(SHAPE, value != value))
    assert value != value or bool((dense == torch.tensor(value, dtype=torch.float16) * 2).all())


def test_a_spec_of_other_rounding_is_refused() -> None:
    tensor = WIRE.read(SETTINGS, stored())
    other = QuantSpec(SETTINGS.code, Scale(torch.float16), Grouping(1, 0))
    with pytest.raises(FormatError, match="can't spell"):
        WIRE.write(SETTINGS, QuantTensor(other, tensor.tensors, tensor.shape))
