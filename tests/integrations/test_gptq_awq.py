"""GPTQ's settings per module and kernels' names, AWQ's old names and scaled activations, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import lowbit
import tiny
from lowbit.errors import FormatError
from lowbit.nn import QuantLinear
from lowbit.nn.activation import ScaledActivation


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def reload(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return lowbit.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)


def quantized(folder: Path, config: Any, kind: str = "llama") -> Any:
    tiny.save(kind, folder)
    return lowbit.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def test_dynamic_gives_modules_settings_of_their_own(tmp_path: Path) -> None:
    dynamic = {
        r"-:.*\.0\.self_attn\.q_proj": {},
        r"+:.*down_proj": {"bits": 8, "group_size": 32},
        r".*\.1\..*(?:gate|up)_proj": {"sym": False, "group_size": -1},
    }
    model = quantized(tmp_path, lowbit.GPTQConfig(bits=4, group_size=64, dynamic=dynamic))
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    layers = model.model.layers
    assert layers[0].mlp.down_proj.spec.bits == 8 and layers[0].mlp.down_proj.spec.grouping.cols == 32
    assert layers[1].mlp.up_proj.spec.grouping.cols == 0
    zeros = layers[1].mlp.up_proj.quant_tensor().tensors["zeros"]
    assert not bool((zeros == 8).all())  # one per row: a byte each; the middle everywhere would be symmetric
    assert bool((layers[0].mlp.up_proj.quant_tensor().tensors["zeros"] == 8).all())
    again = reload(model, tmp_path / "saved")
    assert torch.equal(tiny.logits(again, "llama"), tiny.logits(model, "llama"))
    opened = lowbit.open_checkpoint(tmp_path / "saved")
    assert opened.weights["model.layers.1.mlp.down_proj"].spec.bits == 8
    third = reload(again, tmp_path / "again")
    assert torch.equal(tiny.logits(third, "llama"), tiny.logits(model, "llama"))


def test_only_the_modules_named_in_the_block_are_quantized(tmp_path: Path) -> None:
    config = lowbit.GPTQConfig(bits=4, group_size=64, modules_in_block_to_quantize=[["mlp.up_proj"], ["mlp.gate_proj"]])
    model = quantized(tmp_path, config)
    packed = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert packed == {"up_proj", "gate_proj"}
    assert torch.equal(tiny.logits(reload(model, tmp_path / "saved"), "llama"), tiny.logits(model, "llama"))
    with pytest.raises(FormatError, match="list of lists"):
        quantized(tmp_path, lowbit.GPTQConfig(bits=4, modules_in_block_to_quantize=["up_proj"]))


def test_a_packed_head_is_loaded_packed(tmp_path: Path) -> None:
    model = quantized(tmp_path, lowbit.GPTQConfig(bits=4, group_size=64, sym=False))
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    wire, recipe = model.hf_quantizer.recipe.wire, model.hf_quantizer.recipe
    packed = recipe.algorithm.quantize(head.half(), wire.spec(recipe.settings))
    tensors |= {f"lm_head.{name}": value for name, value in wire.write(recipe.settings, packed).items()}
    save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path / "saved", lambda config: config.update(lm_head=True, static_groups=False))
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert torch.equal(loaded.lm_head.dequantize(torch.float32), packed.dequantize())


def big_llama(folder: Path) -> None:
    config = t.LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    t.LlamaForCausalLM(config).save_pretrained(folder)


def test_a_checkpoint_in_the_layout_of_marlin_loads_and_is_saved_as_it_was(tmp_path: Path) -> None:
    big_llama(tmp_path)
    config = lowbit.GPTQConfig(bits=4, group_size=128)
    plain = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    config = lowbit.GPTQConfig(bits=4, group_size=128, is_marlin_format=True)
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    again = reload(model, tmp_path / "saved")
    assert torch.equal(tiny.logits(again, "llama"), tiny.logits(plain, "llama"))
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert {"B", "s"} <= {name.rpartition(".")[2] for name in names}
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (stored["is_marlin_format"], stored["checkpoint_format"]) == (True, "marlin")
    # Undeclared, the file is refused with the reason.
    edit_config(tmp_path / "saved", lambda data: (data.pop("is_marlin_format"), data.update(checkpoint_format="gptq")))
    with pytest.raises(FormatError, match="packed for the Marlin kernel"):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("spelled", ["exllama", "marlin", "ipex", "GEMM"])
def test_stored_awq_versions_that_name_kernels(spelled: str, tmp_path: Path) -> None:
    model = quantized(tmp_path, lowbit.AwqConfig(group_size=64))
    model.save_pretrained(tmp_path / "saved")
    edit_config(
        tmp_path / "saved", lambda data: data.update(version=spelled, exllama_config={"version": 2}, backend="autoawq")
    )
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))
    assert torch.equal(tiny.logits(reload(loaded, tmp_path / "again"), "llama"), tiny.logits(model, "llama"))


@pytest.mark.parametrize("spelled", ["exllama", "marlin", "ipex"])
def test_stored_gptq_formats_that_name_kernels(spelled: str, tmp_path: Path) -> None:
    model = quantized(tmp_path, lowbit.GPTQConfig(bits=4, group_size=64))
    model.save_pretrained(tmp_path / "saved")
    edit_config(
        tmp_path / "saved",
        lambda data: data.update(checkpoint_format=spelled, use_exllama=True, exllama_config={"version": 2}),
    )
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))


@pytest.mark.parametrize("sidecar", [False, True])
def test_old_names_of_autoawq_in_a_config(sidecar: bool, tmp_path: Path) -> None:
    model = quantized(tmp_path, lowbit.AwqConfig(group_size=64))
    model.save_pretrained(tmp_path / "saved")
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    if sidecar:
        del config["quantization_config"]
        (tmp_path / "saved" / "quant_config.json").write_text(json.dumps(old))
    else:
        config["quantization_config"] = {"quant_method": "awq", **old}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))


SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128}
SCALED = {
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=64, n_layer=1, n_head=2, vocab_size=128)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**SIZES)),
    "mpt": lambda: t.MptForCausalLM(t.MptConfig(d_model=64, n_layers=1, n_heads=2, vocab_size=128, max_seq_len=64)),
    "gptj": lambda: t.GPTJForCausalLM(
        t.GPTJConfig(n_embd=64, n_layer=1, n_head=2, vocab_size=128, rotary_dim=16, n_positions=64)
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(intermediate_size=256, **SIZES)),
    "gpt_bigcode": lambda: t.GPTBigCodeForCausalLM(
        t.GPTBigCodeConfig(n_embd=64, n_layer=1, n_head=2, vocab_size=128, n_positions=64)
    ),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(intermediate_size=256, **SIZES)),  # named as in none of AutoAWQ's
    "starcoder2": lambda: t.Starcoder2ForCausalLM(
        t.Starcoder2Config(intermediate_size=256, num_key_value_heads=2, **SIZES)
    ),
}


def add_scales(folder: Path, kind: str, scales: torch.Tensor) -> str:
    """Store scales for the activation of the one layer, as AutoAWQ does; returns the activation's name."""
    tensors = load_file(folder / "model.safetensors")
    names = {"mpt": ("ffn.", "ffn.act"), "bloom": ("mlp.", "mlp.gelu_impl"), "llama": ("mlp.", "mlp.act_fn")}
    parts = names.get(kind, ("mlp.", "mlp.act"))
    prefix = next(name.partition(parts[0])[0] for name in tensors if parts[0] in name)
    tensors[f"{prefix}{parts[1]}.scales"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{prefix}{parts[1]}"


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # older gpt_bigcode, when imported
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_activations_of_awq(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    SCALED[kind]().save_pretrained(tmp_path / "dense")
    config = lowbit.AwqConfig(group_size=64)
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "saved")
    scales = torch.rand(256) + 0.5
    name = add_scales(tmp_path / "saved", kind, scales)
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    act = model.get_submodule(name)
    model.set_submodule(name, ScaledActivation(act, scales))
    expected = tiny.logits(model, "llama")
    assert torch.equal(loaded.get_submodule(name).scales, scales)
    assert torch.equal(tiny.logits(loaded, "llama"), expected)
    model.set_submodule(name, act)
    assert not torch.equal(tiny.logits(model, "llama"), expected)
    again = reload(loaded, tmp_path / "again")
    assert torch.equal(tiny.logits(again, "llama"), expected)
    dense = loaded.dequantize()
    assert not any(isinstance(module, ScaledActivation) for module in dense.modules())
    torch.testing.assert_close(tiny.logits(dense, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_scales_for_an_activation_that_the_model_lacks(tmp_path: Path) -> None:
    model = quantized(tmp_path, lowbit.AwqConfig(group_size=64))
    model.save_pretrained(tmp_path / "saved")
    add_scales(tmp_path / "saved", "falcon", torch.ones(128))
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.act\.scales.*no such module"):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
