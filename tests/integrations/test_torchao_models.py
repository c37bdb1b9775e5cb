"""torchao through Transformers: on the fly, saved, loaded again; per module; and configs that can't be."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
import tiny
from lowbit.errors import FormatError, PlanError
from lowbit.nn import QuantLinear


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny.save("llama", folder, torch.bfloat16)
    return folder


def load(path: Path, **kwargs: Any) -> Any:
    return lowbit.AutoModelForCausalLM.from_pretrained(path, **kwargs)


def packed(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def stored(kind: str, **fields: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": 2, "_data": fields}


INT8 = stored("Int8WeightOnlyConfig")
CONFIGS = {
    "int4": lambda: lowbit.TorchAoConfig("int4_weight_only", group_size=32),
    "int8": lambda: lowbit.TorchAoConfig("int8_weight_only"),
    "int8-dynamic": lambda: lowbit.TorchAoConfig("int8_dynamic_activation_int8_weight"),
    "float8-dynamic": lambda: lowbit.TorchAoConfig(stored("Float8DynamicActivationFloat8WeightConfig")),
    "8da4w": lambda: lowbit.TorchAoConfig(
        {"default": stored("Int8DynamicActivationIntxWeightConfig", weight_dtype=dtype("int4"))}
    ),
}


def dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_on_the_fly_saved_and_loaded_again(dense: Path, name: str, tmp_path: Path) -> None:
    model = load(dense, quantization_config=CONFIGS[name]())
    layers = packed(model)
    assert len(layers) == 14
    logits = tiny.logits(model, "llama")
    reference = tiny.logits(load(dense), "llama")
    assert (logits - reference).abs().max() < reference.abs().max() / 4
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for module, layer in packed(again).items():
        assert layer.quant_tensor().equal(layers[module].quant_tensor()), module
    assert torch.equal(tiny.logits(again, "llama"), logits)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    assert sum(layer.quant_tensor().nbytes for layer in layers.values()) < 0.75 * sum(
        2 * layer.in_features * layer.out_features for layer in layers.values()
    )


def test_modules_are_quantized_each_in_its_own_way(dense: Path, tmp_path: Path) -> None:
    entries = {
        r"re:.*\.mlp\..*": stored("IntxWeightOnlyConfig", weight_dtype=dtype("int3")),
        "model.layers.0.self_attn.k_proj": None,
        "_default": INT8,
    }
    config = lowbit.TorchAoConfig({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": entries}})
    model = load(dense, quantization_config=config)
    assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear
    assert "FqnToConfig leaves it out" in str(model.hf_quantizer.plan)
    assert model.model.layers[1].mlp.up_proj.spec.bits == 3
    assert model.model.layers[1].self_attn.k_proj.spec.bits == 8
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert set(packed(again)) == set(packed(model))
    assert torch.equal(tiny.logits(again, "llama"), tiny.logits(model, "llama"))


def test_modules_may_stay_dense_and_shards_share_their_headers(dense: Path, tmp_path: Path) -> None:
    config = lowbit.TorchAoConfig("int8_weight_only", modules_to_not_convert=["q_proj"])
    model = load(dense, quantization_config=config)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load(tmp_path)
    assert len(packed(again)) == 12
    assert torch.equal(tiny.logits(again, "llama"), tiny.logits(model, "llama"))


def test_groups_that_do_not_divide_a_row_stay_dense_with_the_reason(dense: Path) -> None:
    model = load(dense, quantization_config=lowbit.TorchAoConfig("int4_weight_only", group_size=128))
    assert set(packed(model)) == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    assert "doesn't divide into blocks of 1 x 128" in str(model.hf_quantizer.plan)


def test_a_config_may_be_repeated_when_loading_but_not_contradicted(dense: Path, tmp_path: Path) -> None:
    load(dense, quantization_config=CONFIGS["int8"]()).save_pretrained(tmp_path)
    assert len(packed(load(tmp_path, quantization_config=CONFIGS["int8"]()))) == 14
    with pytest.raises(PlanError, match="quant_type"):
        load(tmp_path, quantization_config=CONFIGS["int4"]())


def test_a_loaded_model_can_be_copied_and_dequantized(dense: Path) -> None:
    model = load(dense, quantization_config=CONFIGS["8da4w"]())
    logits = tiny.logits(model, "llama")
    assert torch.equal(tiny.logits(pickle.loads(pickle.dumps(model)), "llama"), logits)
    assert torch.equal(tiny.logits(copy.deepcopy(model), "llama"), logits)
    weights = {name: layer.weight.clone() for name, layer in packed(model).items()}
    model.dequantize()
    assert packed(model) == {}
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


def test_registered_plain_transformers_loads_it(dense: Path, tmp_path: Path) -> None:
    load(dense, quantization_config=CONFIGS["int8"]()).save_pretrained(tmp_path)
    lowbit.register()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert len(packed(model)) == 14
    finally:
        lowbit.unregister()


# ------------------------------------------------------------------------------------------------ the config's class


@dataclass
class PerGroup:
    group_size: int


@dataclass
class IntxWeightOnlyConfig:
    """By its name and fields like torchao's."""

    weight_dtype: torch.dtype = torch.int4
    granularity: Any = field(default_factory=lambda: PerGroup(32))
    version: int = 2


def test_objects_are_taken_by_their_names_and_fields() -> None:
    config = lowbit.TorchAoConfig(IntxWeightOnlyConfig())
    assert config.quant_type == {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {
            "weight_dtype": dtype("int4"),
            "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
        },
    }
    assert lowbit.TorchAoConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int2_weight_only",), "unknown quant_type"),
        ((object(),), "a config of torchao, a dict or a text"),
        ((IntxWeightOnlyConfig(granularity=object()),), "can't be stored"),
        ((stored("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d"),), "int4_packing_format"),
        (({"int4": INT8},), "an object with _type"),
    ],
)
def test_wrong_quant_types_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        lowbit.TorchAoConfig(*arguments)


@pytest.mark.parametrize(
    ("name", "keyword"),
    [("int4_weight_only", "groupsize"), ("int8_dynamic_activation_int8_weight", "group_size")],
)
def test_an_unknown_argument_of_an_old_name_raises(name: str, keyword: str) -> None:
    with pytest.raises(ValueError, match=f"takes no argument '{keyword}'"):
        lowbit.TorchAoConfig(name, **{keyword: 32})


def test_packed_embeddings_are_refused(dense: Path) -> None:
    with pytest.raises(PlanError, match="include_input_output_embeddings"):
        load(dense, quantization_config=lowbit.TorchAoConfig(INT8, include_input_output_embeddings=True))


def test_pickled_files_are_refused_with_the_way_out(dense: Path, tmp_path: Path) -> None:
    load(dense, quantization_config=CONFIGS["int8"]()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    for attempt in (load, lowbit.open_checkpoint):
        with pytest.raises(FormatError, match="convert them to safetensors"):
            attempt(tmp_path)
