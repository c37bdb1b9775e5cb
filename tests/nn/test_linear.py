from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lowbit.algorithms import int8_spec, integer_spec, quantize, table_spec
from lowbit.core import QuantSpec, QuantTensor
from lowbit.core.spec import TensorLayout
from lowbit.kernels import Problem, registry
from lowbit.kernels.torch.kernel import TorchKernel
from lowbit.nn import QuantLinear

SPECS = [integer_spec(4, 32), table_spec("nf4", nested=True), int8_spec()]


class ReversedKernel(TorchKernel):
    """A layout of its own: the rows of the codes upside down."""

    name = "reversed"

    def refusal(self, problem: Problem) -> str | None:
        return None if problem.spec.bits == 4 and not problem.spec.grouping.flat else "4-bit rows only"

    def layout(self, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        layout = spec.tensors(shape)
        return {"upside_down": layout.pop("codes"), **layout}

    def prepare(self, tensor: QuantTensor) -> dict[str, Tensor]:
        rest = dict(tensor.tensors)
        return {"upside_down": rest.pop("codes").flip(0), **rest}

    def restore(self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantTensor:
        rest = dict(tensors)
        return QuantTensor(spec, {"codes": rest.pop("upside_down").flip(0), **rest}, shape)

    def apply(
        self,
        inputs: Tensor,
        spec: QuantSpec,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        return super().apply(inputs, spec, shape, self.restore(spec, shape, tensors).tensors, bias)

    def dequantize(
        self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        return super().dequantize(spec, shape, self.restore(spec, shape, tensors).tensors, dtype)


@pytest.fixture
def reversed_kernel() -> object:
    registry.register_kernel(ReversedKernel())
    yield
    registry.unregister_kernel("reversed")


def layer(spec: QuantSpec) -> QuantLinear:
    bias = torch.nn.Parameter(torch.randn(48))
    return QuantLinear.from_tensor(quantize(torch.randn(48, 64), spec), bias=bias, dtype=torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_copies_and_pickles(spec: QuantSpec) -> None:
    module, inputs = layer(spec), torch.randn(3, 64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(inputs), module(inputs))
        assert other.quant_tensor().equal(module.quant_tensor())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.double, torch.nn.Module.bfloat16])
def test_casting_leaves_the_numbers_alone(spec: QuantSpec, cast: object) -> None:
    assert callable(cast)
    module = layer(spec)
    before = copy.deepcopy(module).quant_tensor()
    cast(module)
    assert module.quant_tensor().equal(before)
    assert module.bias.dtype in (torch.float16, torch.float64, torch.bfloat16)


def test_moving_to_meta_and_back_keeps_names_and_shapes() -> None:
    module = layer(SPECS[0])
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    module.to("meta")
    module.to_empty(device="cpu")
    assert {name: value.shape for name, value in module.state_dict().items()} == shapes


def test_state_dicts_load_into_another_layer() -> None:
    module, other = layer(SPECS[1]), layer(SPECS[1])
    other.load_state_dict(module.state_dict())
    assert other.quant_tensor().equal(module.quant_tensor())


def test_kbit_training_setups_that_cast_parameters_lose_nothing() -> None:
    module = layer(SPECS[0])
    before = copy.deepcopy(module).quant_tensor()
    inputs, outputs = torch.randn(3, 64), None
    outputs = module(inputs)
    for parameter in module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    assert torch.equal(module(inputs), outputs)
    assert module.quant_tensor().equal(before)


def test_it_is_a_linear_layer_whose_weight_is_computed() -> None:
    module = layer(SPECS[0])
    assert isinstance(module, torch.nn.Linear)
    assert module.weight.shape == (48, 64)
    assert "weight" not in dict(module.named_parameters())
    with pytest.raises(AttributeError, match="packed"):
        module.weight = torch.nn.Parameter(torch.zeros(48, 64))


def test_bytes_held_are_the_bytes_of_the_tensors() -> None:
    module = layer(SPECS[0])
    held = sum(p.numel() * p.element_size() for p in module.parameters()) - module.bias.numel() * 4
    assert held == module.quant_tensor().nbytes


@pytest.mark.usefixtures("reversed_kernel")
def test_a_kernel_of_its_own_layout_is_chosen_and_undone() -> None:
    tensor = quantize(torch.randn(48, 64), SPECS[0])
    module = QuantLinear.from_tensor(tensor, dtype=torch.float32)
    assert module.kernel == "reversed"
    assert "upside_down" in dict(module.named_parameters())
    assert module.quant_tensor().equal(tensor)
    assert torch.equal(module.weight, tensor.dequantize())
    inputs = torch.randn(2, 64)
    expected = module(inputs)
    module.select_kernel("torch")
    assert torch.equal(module(inputs), expected)
    assert torch.equal(module.codes, tensor.tensors["codes"])


def test_compute_dtype_casts_in_and_out() -> None:
    tensor = quantize(torch.randn(48, 64), SPECS[1])
    module = QuantLinear.from_tensor(tensor, compute_dtype=torch.float32, dtype=torch.bfloat16)
    inputs = torch.randn(2, 64, dtype=torch.bfloat16)
    outputs = module(inputs)
    assert outputs.dtype is torch.bfloat16
    assert torch.equal(outputs, torch.nn.functional.linear(inputs.float(), tensor.dequantize()).bfloat16())
