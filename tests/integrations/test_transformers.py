"""Loading, quantizing and saving through Transformers: every format on every shape of architecture."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
import tiny
from lowbit.errors import PlanError
from lowbit.nn import QuantLinear
from lowbit.wire import CheckpointFiles

CONFIGS = {
    "nf4": lambda: lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4-bf16-storage": lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "int8": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: lowbit.GPTQConfig(bits=4, group_size=32, sym=False),
    "awq": lambda: lowbit.AwqConfig(group_size=32),
}


@pytest.fixture
def registered() -> Iterator[None]:
    lowbit.register()
    yield
    lowbit.unregister()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_quantize_save_reload(kind: str, method: str, tmp_path: Path) -> None:
    dense = tiny.save(kind, tmp_path / "dense")
    loader = tiny.auto(kind, lowbit)
    model = loader.from_pretrained(tmp_path / "dense", quantization_config=CONFIGS[method](), dtype=torch.float32)
    outputs = tiny.logits(model, kind)
    assert (outputs - tiny.logits(dense, kind)).abs().max() > 0
    model.save_pretrained(tmp_path / "packed")
    reloaded = loader.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny.logits(reloaded, kind), outputs)
    assert reloaded.hf_quantizer.plan.quantized == model.hf_quantizer.plan.quantized
    reloaded.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    assert torch.equal(tiny.logits(loader.from_pretrained(tmp_path / "again", dtype=torch.float32), kind), outputs)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("method", CONFIGS)
def test_plain_transformers_after_register(method: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    ours = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=CONFIGS[method](), dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=CONFIGS[method](), dtype=torch.float32
    )
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(ours, "llama"))
    model.save_pretrained(tmp_path / "packed")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny.logits(reloaded, "llama"), tiny.logits(model, "llama"))
    assert any(isinstance(module, QuantLinear) for module in reloaded.modules())


def test_transformers_own_config_objects_are_taken(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    for config in (
        transformers.BitsAndBytesConfig(load_in_8bit=True),
        transformers.GPTQConfig(bits=3, group_size=32),
        transformers.AwqConfig(group_size=64),
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ):
        model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        assert len(model.hf_quantizer.plan.quantized) == 14


def test_unregister_gives_everything_back() -> None:
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    lowbit.register()
    lowbit.register()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is not before[0]["gptq"]
    lowbit.unregister()
    lowbit.unregister()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_the_auto_classes_take_nothing_over(tmp_path: Path) -> None:
    from transformers.quantizers import auto

    tiny.save("llama", tmp_path)
    before = {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in ("gptq", "awq", "bitsandbytes_4bit")}
    lowbit.AutoModelForCausalLM.from_pretrained(tmp_path, load_in_4bit=True)
    assert {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in before} == before


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("places", ["auto", "cpu", "offloaded"])
def test_placement_and_offloading(method: str, places: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    quantized = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=CONFIGS[method](), dtype=torch.float32
    )
    quantized.save_pretrained(tmp_path / "packed")
    expected = tiny.logits(quantized, "llama")
    device_map: Any = {"auto": "auto", "cpu": {"": "cpu"}, "offloaded": _with_disk(quantized)}[places]
    for source, config in (("packed", None), ("dense", CONFIGS[method]())):
        model = lowbit.AutoModelForCausalLM.from_pretrained(
            tmp_path / source,
            quantization_config=config,
            dtype=torch.float32,
            device_map=device_map,
            offload_folder=tmp_path / "offload",
        )
        assert torch.equal(tiny.logits(model, "llama"), expected)
        model.save_pretrained(tmp_path / "saved")
        saved = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert torch.equal(tiny.logits(saved, "llama"), expected)


def _with_disk(model: transformers.PreTrainedModel) -> dict[str, str]:
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    return {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}


@pytest.mark.parametrize("method", CONFIGS)
def test_dequantize_gives_plain_linear_layers(method: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=CONFIGS[method](), dtype=torch.float32
    )
    outputs = tiny.logits(model, "llama")
    model.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    if method != "int8":  # whose activations were rounded too
        torch.testing.assert_close(tiny.logits(model, "llama"), outputs, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "dequantized")
    assert "quantization_config" not in json.loads((tmp_path / "dequantized" / "config.json").read_text())
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized", dtype=torch.float32)
    assert torch.equal(tiny.logits(reloaded, "llama"), tiny.logits(model, "llama"))


def test_dequantize_an_offloaded_model(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=CONFIGS["nf4"](), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "packed")
    expected = tiny.logits(model, "llama")
    offloaded = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, device_map=_with_disk(model), offload_folder=tmp_path / "offload"
    )
    offloaded.dequantize()
    torch.testing.assert_close(tiny.logits(offloaded, "llama"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_copy_pickle_and_move(method: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CONFIGS[method](), dtype=torch.float32
    )
    outputs = tiny.logits(model, "llama")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert torch.equal(tiny.logits(other, "llama"), outputs)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_memory_footprint_is_what_is_held(method: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CONFIGS[method](), dtype=torch.float32
    )
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert model.get_memory_footprint() == sum(storages.values())
    assert sum(module.quant_tensor().nbytes for module in model.modules() if isinstance(module, QuantLinear)) < sum(
        storages.values()
    )


def test_generation_with_a_static_cache_compiles(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        small, quantization_config=CONFIGS["nf4"](), dtype=torch.float32
    )
    ids = tokenizer("The city of London is", return_tensors="pt")
    plain = model.generate(**ids, max_new_tokens=6, do_sample=False)
    static = model.generate(**ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, static)


def test_compiles_as_one_graph(small: Path) -> None:
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        small, quantization_config=CONFIGS["gptq"](), dtype=torch.float32
    )
    ids = torch.arange(20)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_base_model_from_a_head_and_a_new_head_on_a_base(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path / "dense")
    model = lowbit.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", load_in_4bit=True)
    model.save_pretrained(tmp_path / "packed")
    base = lowbit.AutoModel.from_pretrained(tmp_path / "packed")
    assert any(isinstance(module, QuantLinear) for module in base.modules())
    base.save_pretrained(tmp_path / "base")
    headed = lowbit.AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    assert torch.isfinite(headed.classifier.weight).all()


def test_a_user_skip_list_adds_to_the_safe_defaults(small: Path, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["k_proj"])
    model = lowbit.AutoModelForCausalLM.from_pretrained(small, quantization_config=config)
    plan = model.hf_quantizer.plan
    assert plan.kept["lm_head"].reason == "tied to model.embed_tokens"
    assert plan.kept["model.layers.0.self_attn.k_proj"].reason == "skipped by 'k_proj'"
    assert "model.layers.0.self_attn.q_proj" in plan.quantized
    assert type(model.lm_head) is torch.nn.Linear
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "model.layers.0.self_attn.k_proj"} <= set(stored)


def test_modules_that_a_model_keeps_in_fp32_stay(tmp_path: Path) -> None:
    tiny.save("t5", tmp_path)
    model = lowbit.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, load_in_8bit=True, dtype=torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.float32


@pytest.mark.parametrize("requested", [
    lambda: lowbit.GPTQConfig(bits=8),
    lambda: lowbit.GPTQConfig(bits=4, group_size=64),
    lowbit.AwqConfig,
    lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True),
])  # fmt: skip
def test_a_config_that_contradicts_the_stored_one_is_an_error(requested: Any, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=CONFIGS["gptq"]())
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(PlanError, match="is asked for"):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=requested())
    lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=lowbit.GPTQConfig(bits=4))


def test_desc_act_on_the_fly_rounds_in_natural_order(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    config = lowbit.GPTQConfig(bits=4, group_size=32, desc_act=True)
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    reloaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(reloaded, "llama"), tiny.logits(model, "llama"))


def test_opening_a_checkpoint_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save("llama", tmp_path / "dense")
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=CONFIGS["gptq"]())
    model.save_pretrained(tmp_path / "packed")
    reads: list[str] = []
    read = CheckpointFiles.tensor
    monkeypatch.setattr(CheckpointFiles, "tensor", lambda self, name: (reads.append(name), read(self, name))[1])
    checkpoint = lowbit.open_checkpoint(tmp_path / "packed")
    assert reads == []
    checkpoint.weights["model.layers.0.mlp.down_proj"].dequantize()
    assert {name.rpartition(".")[0] for name in reads} == {"model.layers.0.mlp.down_proj"}
    assert len(checkpoint.plan.quantized) == 14
