"""FBGEMM FP8's wire: rows, experts, the bound of activations, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.algorithms import ScaledFloat8
from lowbit.core import QuantTensor, linear
from lowbit.errors import FormatError
from lowbit.wire import find_wire
from lowbit.wire.fbgemm_fp8 import LEAST_SCALE, FbgemmFp8Settings, FbgemmFp8Wire, read_experts, write_experts

WIRE, SETTINGS = FbgemmFp8Wire(), FbgemmFp8Settings()


def quantized(shape: tuple[int, int] = (48, 96), settings: FbgemmFp8Settings = SETTINGS) -> QuantTensor:
    return ScaledFloat8(floor=LEAST_SCALE).quantize(torch.randn(shape), WIRE.spec(settings))


@pytest.mark.parametrize("shape", [(48, 96), (1, 1), (7, 3)])
def test_what_was_written_is_read_back(shape: tuple[int, int]) -> None:
    tensor = quantized(shape)
    written = WIRE.write(SETTINGS, tensor)
    assert WIRE.read(SETTINGS, written).equal(tensor)
    layout = WIRE.expected(SETTINGS, tensor.spec, shape)
    assert {name: (tuple(value.shape), value.dtype) for name, value in written.items()} == layout


def test_the_bound_of_old_files_is_not_read() -> None:
    tensor = quantized()
    written = {**WIRE.write(SETTINGS, tensor), "input_scale_ub": torch.tensor([7.0])}
    assert WIRE.read(SETTINGS, written).equal(tensor)


def test_the_config_is_understood_again() -> None:
    for settings in (SETTINGS, FbgemmFp8Settings(3.5, ("lm_head",))):
        assert find_wire(WIRE.config(settings)).name == "fbgemm_fp8"
        assert WIRE.parse(WIRE.config(settings)) == settings
    assert WIRE.parse({"activation_scale_ub": 1200}) == SETTINGS
    joined = WIRE.join({"a": SETTINGS, "b": SETTINGS}, ["lm_head"])
    assert joined == FbgemmFp8Settings(1200.0, ("lm_head",))
    with pytest.raises(FormatError, match="one layout"):
        WIRE.join({"a": SETTINGS, "b": FbgemmFp8Settings(2.0)}, [])


def test_scales_bring_the_largest_value_to_the_largest_number() -> None:
    weight = torch.randn(16, 32)
    weight[3] = 0
    tensor = ScaledFloat8(floor=LEAST_SCALE).quantize(weight, WIRE.spec(SETTINGS))
    scales, codes = tensor.tensors["scales"], tensor.tensors["codes"].float()
    absmax = weight.abs().amax(1, keepdim=True)
    assert torch.equal(scales, (absmax / 448).clamp(min=LEAST_SCALE))
    assert codes.abs().amax(1).tolist() == [448.0] * 3 + [0.0] + [448.0] * 12
    assert torch.equal(codes, (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("bound", [1200.0, 1.5])
def test_activations_are_rounded_per_token_with_the_bound(bound: float) -> None:
    settings = FbgemmFp8Settings(bound)
    tensor = quantized((64, 96), settings)
    inputs = torch.randn(4, 96) * torch.tensor([[1.0], [100.0], [0.01], [0.0]])
    scales = (inputs.abs().amax(1, keepdim=True).clamp(max=bound) / 448).clamp(min=LEAST_SCALE)
    codes = (inputs / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    products = codes.double() @ tensor.tensors["codes"].double().t()
    expected = (products * scales * tensor.tensors["scales"].t()).float()
    outputs = linear(inputs, tensor.spec, tensor.tensors, tensor.shape)
    # fp32 sums of 96 products in another order: twice the largest difference seen.
    assert (outputs - expected).abs().max() <= 1.2e-6 * expected.abs().max()
    plain = inputs @ tensor.dequantize().t()
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()


def test_experts_of_llama_4_are_read_and_written() -> None:
    for name, (inputs, outputs) in {"gate_up_proj": (32, 48), "down_proj": (24, 32)}.items():
        experts = [quantized((outputs, inputs)) for _ in range(3)]
        written = write_experts(WIRE, SETTINGS, name, experts)
        weight, scale = written[name], written[f"{name}_scale"]
        assert weight.shape == (3, inputs, outputs) and weight.dtype == torch.float8_e4m3fn
        assert scale.shape == ((3, 1, outputs) if name == "gate_up_proj" else (3, outputs, 1))
        dense = weight.float() * scale.reshape(3, 1, outputs)
        again = read_experts(WIRE, SETTINGS, name, weight, scale)
        for expert, tensor in enumerate(again):
            assert tensor.equal(experts[expert])
            assert torch.equal(tensor.dequantize(), dense[expert].t())
        with pytest.raises(FormatError, match=f"{name}_scale: wrong shape"):
            read_experts(WIRE, SETTINGS, name, weight, scale.transpose(1, 2))
        with pytest.raises(FormatError, match="dimensions"):
            read_experts(WIRE, SETTINGS, name, weight[0], scale)


def test_other_weights_are_refused() -> None:
    tensor = quantized()
    other = replace(tensor.spec, activation=replace(tensor.spec.activation, bound=2.0))
    assert "the checkpoint holds" in str(WIRE.refusal(SETTINGS, other, tensor.shape))
    assert WIRE.settings_for(other) == FbgemmFp8Settings(2.0)
    assert WIRE.spelling(SETTINGS, tensor.spec) == tensor.spec
    with pytest.raises(FormatError, match="one layout"):
        WIRE.settings_for(replace(tensor.spec, activation=type(tensor.spec.activation)()))
