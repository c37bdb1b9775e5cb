"""HQQ: every variant that hqq makes, in both directions, to the bit; its checkpoints; its optimiser."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from apart import require, run
from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.algorithms.hqq import HalfQuadratic
from lowbit.core import QuantTensor
from lowbit.core.respell import respell
from lowbit.nn import QuantLinear
from lowbit.wire.hqq.wire import HqqSettings, HqqWire

require("hqq")
SCRIPT = "original_hqq.py"
WIRE = HqqWire()
IDS = torch.arange(3, 13)[None]
OLD = ("old-scale", "old-both", "old-stacked")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hqq")
    run(SCRIPT, "make", folder)
    return folder


@pytest.fixture(scope="module")
def dequantized(made: Path) -> Tensors:
    return load_file(made / "dequantized.safetensors")


@pytest.fixture(scope="module")
def states(made: Path) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for name, tensor in load_file(made / "states.safetensors").items():
        variant, _, suffix = name.partition("/")
        found.setdefault(variant, {})[suffix] = tensor
    return found


def settings_of(state: Tensors) -> HqqSettings:
    """What the config beside such a weight says."""
    bits = round(state["nbits"].item(), 2)
    return HqqSettings(
        nbits=bits,
        group_size=int(state["group_size"]),
        axis=int(state["axis"]),
        view_as_float=bool(state["view_as_float"]),
        round_zero=bits == 4,
    )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: packed weights under a float dtype hold NaNs."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def assert_same_tensors(ours: Tensors, theirs: Tensors) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(raw(ours[name]), raw(tensor)), name


def test_every_variant_is_read_to_the_bit(states: dict[str, Tensors], dequantized: Tensors) -> None:
    assert len(states) == 41
    for name, state in states.items():
        read = WIRE.read(HqqSettings(), state)
        assert torch.equal(read.dequantize(dequantized[name].dtype), dequantized[name]), name
        assert read.spec.dtype == dequantized[name].dtype, name


def test_every_variant_is_written_again_byte_for_byte(states: dict[str, Tensors]) -> None:
    for name, state in states.items():
        if name not in OLD:
            settings = settings_of(state)
            assert_same_tensors(WIRE.write(settings, WIRE.read(settings, state)), state)


def test_older_files_are_written_as_newer_ones(states: dict[str, Tensors]) -> None:
    for name in OLD:
        read = WIRE.read(HqqSettings(), states[name])
        written = WIRE.write(WIRE.settings_for(read.spec), read)
        assert not {"scale_q", "zero_q", "zero_scale"} & set(written)
        assert WIRE.read(HqqSettings(), written).equal(read)


def test_the_optimiser_finds_the_same_numbers(made: Path, states: dict[str, Tensors]) -> None:
    for name, weight in load_file(made / "sources.safetensors").items():
        if name == "ternary":
            continue
        settings = settings_of(states[name])
        shape = (weight.shape[0], weight.shape[1])
        ours = HalfQuadratic().quantize(weight, WIRE.spec_for(settings, shape, weight.dtype))
        assert_same_tensors(WIRE.write(settings, ours), states[name])


@pytest.fixture(scope="module")
def ours(made: Path, states: dict[str, Tensors]) -> dict[str, QuantTensor]:
    """Weights, and models on the fly, that lowbit writes and hqq reads."""
    tensors: dict[str, QuantTensor] = {}
    stored: Tensors = {}
    for name, state in states.items():
        tensor = WIRE.read(HqqSettings(), state)
        settings = HqqSettings() if name in OLD else settings_of(state)
        tensors[name] = tensor
        stored |= {f"{name}/{suffix}": value for suffix, value in WIRE.write(settings, tensor).items()}
    # Another format's weight, with integer zero points.
    converted = RoundToNearest().quantize(torch.randn(64, 96), integer_spec(3, 32))
    settings = replace(WIRE.settings_for(converted.spec), view_as_float=True)
    tensors["converted"] = respell(converted, WIRE.spelling(settings, converted.spec))
    stored |= {f"converted/{suffix}": value for suffix, value in WIRE.write(settings, tensors["converted"]).items()}
    save_file({name: value.contiguous() for name, value in stored.items()}, made / "ours.safetensors")
    for name, config in ON_THE_FLY.items():
        load = lowbit.AutoModelForCausalLM.from_pretrained
        load(made / "dense", quantization_config=config(), dtype=torch.bfloat16).save_pretrained(made / "ours" / name)
    run(SCRIPT, "read", made)
    return tensors


ON_THE_FLY = {
    "default": lowbit.HqqConfig,
    "two": lambda: lowbit.HqqConfig(nbits=2, group_size=16, axis=0, view_as_float=True),
    "whole": lambda: lowbit.HqqConfig(nbits=8, group_size=None, skip_modules=["lm_head", "mlp.up_proj"]),
    "tagged": lambda: lowbit.HqqConfig(
        dynamic_config={"self_attn.v_proj": {"nbits": 3, "group_size": 32}, "mlp.gate_proj": {"nbits": 1, "axis": 0}}
    ),
}


def test_hqq_reads_what_lowbit_wrote(made: Path, ours: dict[str, QuantTensor]) -> None:
    theirs = load_file(made / "theirs.safetensors")
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor.dequantize(theirs[name].dtype)), name


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("name", ON_THE_FLY)
def test_hqq_runs_what_lowbit_quantized(made: Path, name: str) -> None:
    model = lowbit.AutoModelForCausalLM.from_pretrained(made / "ours" / name, dtype="auto")
    theirs = load_file(made / "logits.safetensors")[name]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs)


@pytest.mark.parametrize("kind", ["plain", "tagged", "plain-transformers", "tagged-transformers"])
def test_checkpoints_of_hqq_and_of_transformers(made: Path, kind: str, tmp_path: Path) -> None:
    """With and without a quantization_config; Transformers 4 had fp32 scales."""
    name = kind.partition("-")[0]
    expected = load_file(made / f"{name}.safetensors")
    checkpoint = lowbit.open_checkpoint(made / kind)
    model = lowbit.AutoModelForCausalLM.from_pretrained(made / kind, dtype="auto")
    assert set(checkpoint.weights) == set(expected)
    for module, weight in expected.items():
        assert torch.equal(checkpoint.weights[module].dequantize(weight.dtype), weight)
        assert torch.equal(model.get_submodule(module).dequantize(weight.dtype), weight)
    assert len([module for module in model.modules() if isinstance(module, QuantLinear)]) == len(expected)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_file(made / f"{name}-logits.safetensors")["logits"])
    model.save_pretrained(tmp_path)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), load_file(made / kind / "model.safetensors"))
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    original = json.loads((made / f"{name}-transformers" / "config.json").read_text())["quantization_config"]
    assert stored == original


def test_on_the_fly_is_what_hqq_makes(made: Path) -> None:
    """The same weights as in hqq's own model, from the config of Transformers."""
    config = lowbit.HqqConfig(
        dynamic_config={
            "self_attn.q_proj": {"nbits": 8, "group_size": 64},
            "mlp.down_proj": {"nbits": 2, "group_size": 16, "axis": 0},
        }
    )
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        made / "dense", quantization_config=config, dtype=torch.bfloat16
    )
    expected = load_file(made / "tagged.safetensors")
    assert set(model.hf_quantizer.plan.quantized) == set(expected)
    for module, weight in expected.items():
        assert torch.equal(model.get_submodule(module).dequantize(weight.dtype), weight)
