"""Properties that every wire has: what was written is read back to the bit, and what doesn't fit is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.algorithms import RoundToNearest, integer_spec, quantize
from lowbit.core import QuantTensor
from lowbit.errors import FormatError
from lowbit.wire import AwqWire, Bitsandbytes4Wire, Bitsandbytes8Wire, GptqWire, Wire, find_wire, wires
from lowbit.wire.awq import AwqSettings
from lowbit.wire.bitsandbytes import Settings4, Settings8
from lowbit.wire.gptq import GptqSettings

GPTQ, AWQ, BNB4, BNB8 = GptqWire(), AwqWire(), Bitsandbytes4Wire(), Bitsandbytes8Wire()
CASES: list[tuple[Wire[Any], Any]] = [
    *((GPTQ, GptqSettings(bits, group, version=version, symmetric=False))
      for bits in (2, 3, 4, 8) for group in (32, 96, -1) for version in (1, 2)),
    *((GPTQ, GptqSettings(4, 32, symmetric=False, borrows=False)),),
    *((AWQ, AwqSettings(layout, group, version=layout))
      for layout in ("gemm", "gemv", "gemv_fast") for group in (32, 64, -1)),
    (AWQ, AwqSettings("gemv_fast", 64, version="llm-awq")),
    *((BNB4, Settings4(kind, nested, storage))
      for kind in ("nf4", "fp4") for nested in (False, True) for storage in (torch.uint8, torch.bfloat16)),
    (BNB8, Settings8(6.0)),
]  # fmt: skip


def quantized(wire: Wire[Any], settings: Any, shape: tuple[int, int] = (64, 192)) -> QuantTensor:
    return quantize(torch.randn(shape), wire.spec(settings))


@pytest.mark.parametrize(("wire", "settings"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_what_was_written_is_read_back(wire: Wire[Any], settings: Any) -> None:
    tensor = quantized(wire, settings)
    written = wire.write(settings, tensor)
    assert wire.read(settings, written).equal(tensor)
    for name, (shape, dtype) in wire.expected(settings, tensor.spec, tensor.shape).items():
        if name in written:
            assert (tuple(written[name].shape), written[name].dtype) == (shape, dtype)
    assert set(written) <= set(wire.suffixes)


@pytest.mark.parametrize(("wire", "settings"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_the_config_is_understood_again(wire: Wire[Any], settings: Any) -> None:
    config = wire.config(settings)
    assert find_wire(config) is not None and find_wire(config).name == wire.name
    assert wire.parse(config) == settings


@pytest.mark.parametrize(("wire", "settings"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_a_missing_tensor_is_named(wire: Wire[Any], settings: Any) -> None:
    written = wire.write(settings, quantized(wire, settings))
    for name in written:
        if name in ("g_idx", "weight_format"):
            continue
        rest = {key: value for key, value in written.items() if key != name}
        with pytest.raises(FormatError):
            wire.read(settings, rest)


@pytest.mark.parametrize(("wire", "settings"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_a_truncated_tensor_is_refused(wire: Wire[Any], settings: Any) -> None:
    written = wire.write(settings, quantized(wire, settings))
    for name, tensor in written.items():
        if tensor.dim() == 0 or (name == "qweight" and settings == AwqSettings("gemm", -1)):
            continue  # One group per row: any number of rows is a weight; the module's own shape is checked on loading.
        with pytest.raises(FormatError):
            wire.read(settings, {**written, name: tensor[:-1]})


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (3, 64), (64, 3)])
def test_bitsandbytes_holds_any_shape(shape: tuple[int, int]) -> None:
    for settings in (Settings4("nf4"), Settings4("fp4", nested=True)):
        tensor = quantized(BNB4, settings, shape)
        assert BNB4.read(settings, BNB4.write(settings, tensor)).equal(tensor)


@given(st.sampled_from([2, 4, 8]), st.data())
def test_zero_points_survive_both_dialects_of_gptq(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=64, max_size=64))
    tensor = RoundToNearest().quantize(torch.randn(32, 64), integer_spec(bits, 32))
    from lowbit.core import pack

    zeros = pack(torch.tensor(values).view(32, 2), bits)
    tensor = QuantTensor(tensor.spec, {**tensor.tensors, "zeros": zeros}, tensor.shape)
    for version in (1, 2):
        for borrows in (False, True):
            settings = GptqSettings(bits, 32, symmetric=False, version=version, borrows=borrows)
            assert GPTQ.read(settings, GPTQ.write(settings, tensor)).equal(tensor)


def test_a_permutation_survives_and_a_plain_one_is_recognised() -> None:
    settings = GptqSettings(4, 32, symmetric=False, desc_act=True)
    tensor = RoundToNearest().quantize(torch.randn(32, 128), integer_spec(4, 32))
    written = GPTQ.write(settings, tensor)
    assert not GPTQ.read(settings, written).spec.grouping.permuted
    written["g_idx"] = written["g_idx"][torch.randperm(128)]
    permuted = GPTQ.read(settings, written)
    assert permuted.spec.grouping.permuted
    assert torch.equal(GPTQ.write(settings, permuted)["g_idx"], written["g_idx"])


def test_g_idx_may_be_absent() -> None:
    settings = GptqSettings(4, 32)
    tensor = RoundToNearest(symmetric=True).quantize(torch.randn(32, 128), integer_spec(4, 32))
    written = GPTQ.write(settings, tensor)
    del written["g_idx"]
    assert GPTQ.read(settings, written).equal(tensor)


def test_llm_awq_calls_its_zeros_scaled_zeros() -> None:
    settings = AWQ.parse({"quant_method": "awq", "version": "llm-awq", "bits": 4, "group_size": 64})
    written = AWQ.write(settings, quantized(AWQ, settings))
    assert set(written) == {"qweight", "scales", "scaled_zeros"}


@pytest.mark.parametrize("spelled", ["exllama", "marlin", "ipex", "GEMM"])
def test_names_of_kernels_are_read_as_gemm(spelled: str) -> None:
    assert AWQ.parse({"version": spelled}).layout == "gemm"


def test_old_names_of_autoawq() -> None:
    assert AWQ.parse({"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}).group_size == 64


@pytest.mark.parametrize(
    ("wire", "settings", "shape", "reason"),
    [
        (GPTQ, GptqSettings(4, 32), (30, 64), "whole 32-bit words"),
        (AWQ, AwqSettings("gemm", 64), (64, 96), "don't divide"),
        (AWQ, AwqSettings("gemm", 32), (60, 64), "multiple of 8"),
        (AWQ, AwqSettings("gemv_fast", 32), (64, 96), "4 x 64"),
        (AWQ, AwqSettings("gemv", 16), (64, 64), "groups of 32, 64"),
        (BNB4, Settings4("nf4", storage=torch.float32), (3, 3), "whole torch.float32"),
    ],
)
def test_what_a_format_cannot_hold(wire: Wire[Any], settings: Any, shape: tuple[int, int], reason: str) -> None:
    refusal = wire.refusal(settings, wire.spec(settings), shape)
    assert refusal is not None and reason in refusal


def test_a_spec_of_another_format_is_refused() -> None:
    tensor = quantize(torch.randn(64, 64), BNB4.spec(Settings4("nf4")))
    for wire, settings in ((GPTQ, GptqSettings(4)), (AWQ, AwqSettings()), (BNB8, Settings8())):
        with pytest.raises(FormatError, match="can't spell"):
            wire.write(settings, tensor)


def test_wires_have_different_names() -> None:
    names = [wire.name for wire in wires()]
    assert len(names) == len(set(names))
