from __future__ import annotations

import pytest
import torch

from lowbit.algorithms import int8_spec, integer_spec, quantize, table_spec
from lowbit.core import QuantSpec
from lowbit.errors import KernelUnavailable
from lowbit.kernels import Problem, explain, kernel_named, ops, select
from lowbit.nn import QuantLinear

SPECS = [integer_spec(4, 32), integer_spec(3, -1), table_spec("nf4"), table_spec("fp4", nested=True), int8_spec(6.0)]


def layer(spec: QuantSpec, bias: bool = True, shape: tuple[int, int] = (48, 64)) -> QuantLinear:
    values = torch.nn.Parameter(torch.randn(shape[0])) if bias else None
    return QuantLinear.from_tensor(quantize(torch.randn(shape), spec), bias=values, dtype=torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operators_are_well_formed(spec: QuantSpec) -> None:
    module = layer(spec)
    inputs = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.lowbit.linear, (inputs, module.packed, module.bias, module.spec_key, module.kernel, 48)
    )
    torch.library.opcheck(
        torch.ops.lowbit.dequantize, (module.packed, module.spec_key, module.kernel, 48, 64, torch.float16)
    )


@pytest.mark.parametrize("spec", SPECS[:-1], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)])
def test_forward_and_gradients_equal_a_dense_layer(spec: QuantSpec, lead: tuple[int, ...]) -> None:
    module = layer(spec)
    inputs = torch.randn(*lead, 64, requires_grad=True)
    outputs = module(inputs)
    outputs.square().sum().backward()
    ours, bias_gradient = inputs.grad, module.bias.grad
    inputs.grad = None
    dense_bias = module.bias.detach().clone().requires_grad_()
    reference = torch.nn.functional.linear(inputs, module.weight, dense_bias)
    reference.square().sum().backward()
    assert torch.equal(outputs, reference)
    torch.testing.assert_close(ours, inputs.grad)
    torch.testing.assert_close(bias_gradient, dense_bias.grad)


def test_int8_gradients_pass_straight_through() -> None:
    module = layer(int8_spec(6.0))
    inputs = torch.randn(4, 64, requires_grad=True)
    module(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, torch.ones(4, 48) @ module.weight)


def test_packed_weights_get_no_gradient() -> None:
    module = layer(SPECS[0])
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == ["bias"]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compiles_without_graph_breaks(spec: QuantSpec) -> None:
    module = layer(spec)
    inputs = torch.randn(3, 64)
    inputs[0, 3] = 40  # an outlier: what the int8 path does about it stays inside the operator
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), module(inputs))


def test_autocast_computes_in_its_dtype() -> None:
    module = layer(SPECS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 64)).dtype is torch.bfloat16


def test_the_registry_names_every_reason() -> None:
    problem = Problem(SPECS[0], (48, 64), "cpu", torch.float32)
    reasons = dict(explain(problem))
    assert reasons["torch"] is None
    assert "not on cpu" in str(reasons["triton-wna16"])
    assert select(problem).name == "torch"


def test_an_unknown_kernel_is_an_error() -> None:
    with pytest.raises(KernelUnavailable, match="no kernel is called 'marlin'"):
        kernel_named("marlin")


def test_an_operator_refuses_the_wrong_number_of_tensors() -> None:
    module = layer(SPECS[0])
    with pytest.raises(ValueError, match="shorter"):
        ops.linear(torch.randn(2, 64), module.packed[:-1], None, module.spec_key, "torch", 48)


def stacks(spec: QuantSpec, experts: int = 4) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tensors of one weight per expert, stacked, and the dense weights."""
    tensors = [quantize(torch.randn(48, 64), spec) for _ in range(experts)]
    packed = [torch.stack([tensor.tensors[name] for tensor in tensors]) for name in spec.tensors((48, 64))]
    return packed, torch.stack([tensor.dequantize(torch.float32) for tensor in tensors])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_expert_operators_are_well_formed(spec: QuantSpec) -> None:
    packed, _ = stacks(spec)
    experts = torch.tensor([3, 0, 3, 1, 4])
    inputs, bias = torch.randn(5, 64, requires_grad=True), torch.randn(4, 48, requires_grad=True)
    own = spec.to_json(), "torch"
    torch.library.opcheck(torch.ops.lowbit.expert_linear, (inputs, experts, packed, bias, *own, 48))
    torch.library.opcheck(torch.ops.lowbit.expert_linear_backward, (torch.randn(5, 48), experts, packed, *own, 64))


@pytest.mark.parametrize("spec", SPECS[:-1], ids=str)
@pytest.mark.parametrize("chosen", [[], [2], [3, 0, 3, 1, 4, 0, 7]], ids=str)
def test_each_row_meets_its_expert(spec: QuantSpec, chosen: list[int]) -> None:
    packed, dense = stacks(spec)
    experts = torch.tensor(chosen, dtype=torch.int64)
    inputs = torch.randn(len(chosen), 64, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    outputs = ops.expert_linear(inputs, experts, packed, bias, spec.to_json(), "torch", 48)
    outputs.square().sum().backward()
    ours, bias_gradient = inputs.grad, bias.grad
    inputs.grad = bias.grad = None
    rows = [
        torch.nn.functional.linear(row, dense[expert].double(), bias[expert])
        if expert < 4
        else torch.zeros(48).double()
        for row, expert in zip(inputs, chosen, strict=True)
    ]
    reference = torch.stack(rows) if rows else outputs.detach()
    torch.testing.assert_close(outputs, reference)
    if any(expert < 4 for expert in chosen):
        reference.square().sum().backward()
        torch.testing.assert_close(ours, inputs.grad)
        torch.testing.assert_close(bias_gradient, bias.grad)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]], ids=str)
def test_picking_each_rows_expert_gives_what_sorting_gives(spec: QuantSpec) -> None:
    packed, _ = stacks(spec)
    experts = torch.tensor([3, 0, 3, 1, 9])
    by_sorting = {
        int(row): tensors
        for rows, tensors in ops._by_expert(experts, packed, spec)
        for row in torch.arange(5)[rows].tolist()
    }
    by_row = [tensors for _, tensors in ops._row_by_row(experts, packed)]
    for row, tensors in by_sorting.items():
        assert all(torch.equal(left, right) for left, right in zip(tensors, by_row[row], strict=True))
    assert len(by_row) == 5 and set(by_sorting) == {0, 1, 2, 3}
