"""The examples of the original documentation that concern these three families, with a local model for the hub's name.

Each runs as it was printed but for the model, the devices (a CPU here) and the import of what Transformers has dropped.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.algorithms import int8_spec, quantize
from lowbit.nn import QuantLinear, plan_model, quantize_model

PROMPT = "The city of London is"


@pytest.fixture(scope="module")
def saved(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Quantized checkpoints of the small model."""
    configs = {
        "awq": lowbit.AwqConfig(),
        "gptq": lowbit.GPTQConfig(bits=4),
        "bnb8": lowbit.BitsAndBytesConfig(load_in_8bit=True),
        "bnb4": lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    folders = {}
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model = lowbit.AutoModelForCausalLM.from_pretrained(small, quantization_config=config)
        model.save_pretrained(folders[name])
        transformers.AutoTokenizer.from_pretrained(small).save_pretrained(folders[name])
    return folders


def packed(model: transformers.PreTrainedModel) -> int:
    return sum(isinstance(module, QuantLinear) for module in model.modules())


def generate(model: transformers.PreTrainedModel, folder: Path) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    text: str = tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True)
    return text


# ------------------------------------------------------------------------------------------------ AWQ


def test_awq_load(auto: Any, saved: dict[str, Path]) -> None:
    model = auto.from_pretrained(saved["awq"], device_map="cpu")
    assert packed(model) == 28
    assert generate(model, saved["awq"]).startswith(PROMPT)


def test_awq_load_then_move(auto: Any, saved: dict[str, Path]) -> None:
    model = auto.from_pretrained(saved["awq"]).to("cpu")
    assert packed(model) == 28


def test_awq_other_weights_are_fp16_unless_torch_dtype_says_otherwise(saved: dict[str, Path]) -> None:
    load = lowbit.AutoModelForCausalLM.from_pretrained
    assert load(saved["awq"]).model.norm.weight.dtype is torch.float16
    assert load(saved["awq"], torch_dtype=torch.float32).model.norm.weight.dtype is torch.float32
    assert load(saved["awq"], torch_dtype=torch.bfloat16).model.norm.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("spelling", [{"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}])
def test_awq_with_flash_attention(
    spelling: dict[str, Any], saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = transformers.AutoModelForCausalLM.from_pretrained.__func__

    def without_the_package(cls: type, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return real(cls, *args, **{**kwargs, "attn_implementation": "sdpa"})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", classmethod(without_the_package))
    lowbit.AutoModelForCausalLM.from_pretrained(saved["awq"], device_map="cpu", **spelling)
    assert seen["attn_implementation"] == "flash_attention_2"


def test_awq_fused_modules_are_checked_and_run_unfused(saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="fuse_max_seq_len"):
        lowbit.AwqConfig(bits=4, do_fuse=True)
    with pytest.raises(ValueError, match="modules_to_fuse lacks"):
        lowbit.AwqConfig(bits=4, fuse_max_seq_len=512, modules_to_fuse={"attention": []})
    with pytest.warns(UserWarning, match="not implemented yet"):
        config = lowbit.AwqConfig(bits=4, fuse_max_seq_len=512, do_fuse=True)
    model = lowbit.AutoModelForCausalLM.from_pretrained(saved["awq"], quantization_config=config).to("cpu")
    assert packed(model) == 28


@pytest.mark.parametrize("version", ["gemm", "exllama", "ipex"])
def test_awq_versions_are_kernel_hints(version: str, saved: dict[str, Path], tmp_path: Path) -> None:
    config = lowbit.AwqConfig(version=version)
    model = lowbit.AutoModelForCausalLM.from_pretrained(saved["awq"], quantization_config=config)
    model.save_pretrained(tmp_path)
    before = lowbit.open_checkpoint(saved["awq"]).config
    assert lowbit.open_checkpoint(tmp_path).config == before


# ------------------------------------------------------------------------------------------------ GPTQ


def test_gptq_quantize_with_a_dataset_of_strings(auto: Any, small: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    dataset = [
        "auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on GPTQ algorithm."
    ]
    gptq_config = transformers.GPTQConfig(bits=4, dataset=dataset, tokenizer=tokenizer)
    quantized_model = auto.from_pretrained(small, device_map="auto", quantization_config=gptq_config)
    rounded = auto.from_pretrained(small, device_map="auto", quantization_config=transformers.GPTQConfig(bits=4))
    assert packed(quantized_model) == packed(rounded) == 28
    layers = [model.model.layers[0].mlp.down_proj.quant_tensor() for model in (quantized_model, rounded)]
    assert layers[0].spec == layers[1].spec and not layers[0].equal(layers[1])
    quantized_model.to("cpu")
    quantized_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path, device_map="auto")
    assert generate(model, tmp_path) == generate(quantized_model, tmp_path)


def test_gptq_names_of_datasets(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    for name in ("c4", "c4-new", "wikitext2"):
        lowbit.GPTQConfig(bits=4, dataset=name, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="pile"):
        lowbit.GPTQConfig(bits=4, dataset="pile", tokenizer=tokenizer)


def test_gptq_max_memory(auto: Any, small: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(
            small, device_map="auto", max_memory={"cpu": "30GiB"}, quantization_config=transformers.GPTQConfig(bits=4)
        )
    assert packed(model) == 28


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_gptq_bits(bits: int, auto: Any, small: Path) -> None:
    model = auto.from_pretrained(small, quantization_config=transformers.GPTQConfig(bits=bits))
    assert {spec.bits for spec in model.hf_quantizer.plan.quantized.values()} == {bits}


@pytest.mark.parametrize(
    "hints",
    [{}, {"use_exllama": False}, {"use_exllama": True}, {"exllama_config": {"version": 2}}, {"disable_exllama": True}],
    ids=str,
)
def test_gptq_exllama_hints(hints: dict[str, Any], auto: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    gptq_config = lowbit.GPTQConfig(bits=4, **hints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(saved["gptq"], device_map="cpu", quantization_config=gptq_config)
    assert generate(model, saved["gptq"]).startswith(PROMPT)
    off = hints.get("use_exllama") is False or hints.get("disable_exllama") is True
    assert model.hf_quantizer.recipe.kernel == ("torch" if off else None)
    model.save_pretrained(tmp_path)
    assert lowbit.open_checkpoint(tmp_path).config == lowbit.open_checkpoint(saved["gptq"]).config


def test_gptq_hints_are_validated() -> None:
    with pytest.raises(ValueError, match="version"):
        lowbit.GPTQConfig(bits=4, exllama_config={"version": 3})
    with pytest.raises(ValueError, match="not both"):
        lowbit.GPTQConfig(bits=4, use_exllama=True, disable_exllama=True)


# ------------------------------------------------------------------------------------------------ bitsandbytes


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_flags_divide_the_memory(flag: str, small: Path) -> None:
    dense = lowbit.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float16)
    model = lowbit.AutoModelForCausalLM.from_pretrained(small, device_map="auto", **{flag: True})
    linears = sum(module.quant_tensor().nbytes for module in model.modules() if isinstance(module, QuantLinear))
    before = sum(dense.get_submodule(name).weight.nbytes for name in model.hf_quantizer.plan.quantized)
    roughly = 2 if flag == "load_in_8bit" else 4
    assert before / linears == pytest.approx(roughly, rel=0.15)
    assert dense.get_memory_footprint() - model.get_memory_footprint() == before - linears
    assert model.model.norm.weight.dtype is torch.float16


def test_bitsandbytes_torch_dtype_of_other_modules(small: Path) -> None:
    model_8bit = lowbit.AutoModelForCausalLM.from_pretrained(small, load_in_8bit=True, torch_dtype=torch.float32)
    assert model_8bit.model.layers[-1].input_layernorm.weight.dtype is torch.float32


def test_bitsandbytes_compute_dtype(auto: Any, small: Path) -> None:
    quantization_config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = auto.from_pretrained(small, quantization_config=quantization_config)
    assert model.model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16
    plain = auto.from_pretrained(small, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))
    assert plain.model.layers[0].mlp.up_proj.compute_dtype is torch.float32


def test_bitsandbytes_nf4_and_double_quant(auto: Any, small: Path) -> None:
    nf4_config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    double_quant_config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    nf4 = auto.from_pretrained(small, quantization_config=nf4_config).model.layers[0].mlp.up_proj.quant_tensor()
    nested = (
        auto.from_pretrained(small, quantization_config=double_quant_config).model.layers[0].mlp.up_proj.quant_tensor()
    )
    assert str(nf4.spec.code) == "nf4"
    assert str(nested.spec.code) == "fp4"
    # 0.4 bits a weight, less what the second table of 1 KiB takes in a layer of 196,608 weights.
    assert nf4.bits_per_weight - nested.bits_per_weight == pytest.approx(0.373 - 8 * 1024 / 196608, abs=0.005)


def test_bitsandbytes_reload_without_flags(auto: Any, saved: dict[str, Path]) -> None:
    for name in ("bnb8", "bnb4"):
        model = auto.from_pretrained(saved[name], device_map="auto")
        assert packed(model) == 28
        assert generate(model, saved[name]).startswith(PROMPT)


def test_bitsandbytes_config_is_written_before_the_weights(saved: dict[str, Path]) -> None:
    config, weights = saved["bnb8"] / "config.json", saved["bnb8"] / "model.safetensors"
    assert config.stat().st_mtime_ns <= weights.stat().st_mtime_ns


def test_bitsandbytes_offload_config_means_8_bits(auto: Any, small: Path) -> None:
    quantization_config = transformers.BitsAndBytesConfig(llm_int8_enable_fp32_cpu_offload=True)
    model_8bit = auto.from_pretrained(small, device_map={"": "cpu"}, quantization_config=quantization_config)
    assert {str(spec.code) for spec in model_8bit.hf_quantizer.plan.quantized.values()} == {"int8"}


def test_bitsandbytes_integer_threshold(auto: Any, small: Path) -> None:
    quantization_config = lowbit.BitsAndBytesConfig(llm_int8_threshold=10)
    model_8bit = auto.from_pretrained(small, device_map="cpu", quantization_config=quantization_config)
    assert {spec.activation.threshold for spec in model_8bit.hf_quantizer.plan.quantized.values()} == {10.0}
    assert model_8bit.config.quantization_config.load_in_8bit


def test_bitsandbytes_skip_modules(auto: Any, small: Path) -> None:
    quantization_config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"])
    model_8bit = auto.from_pretrained(small, device_map="cpu", quantization_config=quantization_config)
    assert type(model_8bit.lm_head) is torch.nn.Linear
    assert packed(model_8bit) == 28


def test_bitsandbytes_only_extra_parameters_train(small: Path) -> None:
    model = lowbit.AutoModelForCausalLM.from_pretrained(small, load_in_4bit=True, dtype=torch.float32)
    ids = torch.arange(10, 30)[None]
    model.train()
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert model.model.norm.weight.grad is not None


def test_outlier_activations_keep_their_accuracy(small: Path) -> None:
    """Scale some channels of a norm up and the columns behind it down: the same function, with outliers beyond 6."""
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    block = model.model.layers[1]
    channels = torch.tensor([3, 77])
    with torch.no_grad():
        block.input_layernorm.weight[channels] *= 40
        for name in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(name).weight[:, channels] /= 40
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        exact = model(ids).logits
    errors = {}
    for threshold in (0.0, 6.0):
        other = copy.deepcopy(model)
        attention = other.model.layers[1].self_attn
        quantize_model(attention, plan_model(attention, int8_spec(threshold), skip=["o_proj"]), quantize)
        with torch.no_grad():
            errors[threshold] = (other(ids).logits - exact).abs().mean()
    assert errors[6.0] < errors[0.0] / 2
