"""Units: every matrix of a plan once, as a view ``[out, in]``, however its module stores it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blocks
from lowbit.algorithms import integer_spec
from lowbit.calibration.stacks import block_lists, find_stacks
from lowbit.calibration.units import find_units, units_below
from lowbit.core import Plan
from lowbit.errors import PlanError
from lowbit.nn import plan_model

SPEC = integer_spec(4, 16)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "mixtral", "gpt_oss", "deepseek_v3", "t5"])
def test_units_are_all_that_is_planned_and_views_of_it(kind: str) -> None:
    model = blocks.traced(kind).model
    plan = plan_model(model, SPEC, skip=["lm_head"])
    units = find_units(model, plan)
    assert len({unit.name for unit in units}) == len(units)
    counted: dict[str, int] = {}
    for unit in units:
        weight = unit.weight(model.get_submodule(unit.module))
        assert tuple(weight.shape) == unit.shape and unit.spec == SPEC and not weight.requires_grad
        counted[unit.full_parameter] = counted.get(unit.full_parameter, 0) + weight.numel()
        weight.zero_()
    for name, count in counted.items():
        parameter = model.get_parameter(name)
        assert parameter.numel() == count and not parameter.any()
    planned = {name if name in counted else f"{name}.weight" for name in plan.quantized}
    assert set(counted) == planned


def test_a_linear_layer_and_conv1d_compute_with_their_units() -> None:
    for kind, path in (("llama", "self_attn.o_proj"), ("gpt2", "attn.c_proj")):
        traced = blocks.traced(kind)
        unit = next(u for u in find_units(traced.model, plan_model(traced.model, SPEC)) if u.name.endswith(f"1.{path}"))
        layer, inputs = traced.block.get_submodule(path), torch.randn(3, 32)
        outputs = inputs @ unit.weight(layer).t() + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(inputs), outputs)


def test_parts_of_experts() -> None:
    model = blocks.traced("mixtral").model
    units = [unit for unit in find_units(model, plan_model(model, SPEC)) if unit.expert is not None]
    names = [unit.name for unit in units if unit.module == "model.layers.1.mlp.experts"]
    parts = ("gate_proj", "up_proj", "down_proj")
    assert names == [f"model.layers.1.mlp.experts.{expert}.{part}" for part in parts for expert in range(4)]
    experts = model.model.layers[1].mlp.experts
    found = {unit.name.rpartition("experts.")[2]: unit.weight(experts) for unit in units if unit.name in names}
    assert torch.equal(found["2.gate_proj"], experts.gate_up_proj[2, :48])
    assert torch.equal(found["2.up_proj"], experts.gate_up_proj[2, 48:])
    assert torch.equal(found["2.down_proj"], experts.down_proj[2])


def test_units_are_found_without_weights() -> None:
    model = blocks.traced("mixtral").model
    expected = find_units(model, plan_model(model, SPEC))
    model.to("meta")
    assert find_units(model, plan_model(model, SPEC)) == expected


def test_what_is_neither_a_layer_nor_experts() -> None:
    model = blocks.traced("llama").model
    with pytest.raises(PlanError, match="'model.layers.0.weights' is neither a linear layer nor a projection"):
        find_units(model, Plan({"model.layers.0.weights": SPEC}, {"model.layers.0.weights": (4, 4)}))


def test_units_below_a_block_are_not_those_of_its_namesakes() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(16, 16)) for _ in range(12)])})
    units = find_units(model, plan_model(model, SPEC))
    assert [unit.name for unit in units_below(units, "layers.1")] == ["layers.1.0"]
    assert [unit.name for unit in units_below(units, "layers.1.0")] == ["layers.1.0"]
    assert len(units_below(units, "layers")) == 12 and units_below(units, "layer") == []


def test_stacks_are_the_outermost_lists_of_blocks() -> None:
    t5, mixtral = blocks.traced("t5").model, blocks.traced("mixtral").model
    assert block_lists(t5) == ["encoder.block", "decoder.block"]
    assert block_lists(mixtral) == ["model.layers"]
    stacks = find_stacks(t5, find_units(t5, plan_model(t5, SPEC)))
    assert [stack.blocks for stack in stacks] == [
        ("encoder.block.0", "encoder.block.1"),
        ("decoder.block.0", "decoder.block.1"),
    ]
    with pytest.raises(PlanError, match="no list of repeated blocks holds what is to be quantized"):
        find_stacks(t5, [])
