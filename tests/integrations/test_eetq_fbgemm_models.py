"""EETQ and FBGEMM FP8 through Transformers: on the fly, saved, loaded again, and what their readers look for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
import tiny
from lowbit.errors import PlanError
from lowbit.nn import QuantLinear


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny.save("llama", folder, torch.float32)
    return folder


def load(path: Path, **kwargs: Any) -> Any:
    return lowbit.AutoModelForCausalLM.from_pretrained(path, **kwargs)


def packed(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def stored_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return config


CONFIGS = {"eetq": lowbit.EetqConfig, "fbgemm_fp8": lowbit.FbgemmFp8Config}
DTYPES = {"eetq": torch.float16, "fbgemm_fp8": torch.bfloat16}


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_on_the_fly_saved_and_loaded_again(dense: Path, name: str, tmp_path: Path) -> None:
    model = load(dense, quantization_config=CONFIGS[name]())
    assert model.dtype == DTYPES[name]
    layers = packed(model)
    assert len(layers) == 14
    logits = tiny.logits(model, "llama")
    reference = tiny.logits(load(dense), "llama")
    assert (logits - reference).abs().max() < reference.abs().max() / 8
    model.save_pretrained(tmp_path)
    assert stored_config(tmp_path)["modules_to_not_convert"] is None
    again = load(tmp_path)
    for module, layer in packed(again).items():
        assert layer.quant_tensor().equal(layers[module].quant_tensor()), module
    assert torch.equal(tiny.logits(again, "llama"), logits)
    assert model.generate(**tiny.inputs("llama"), max_new_tokens=3, do_sample=False).shape == (1, 13)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_list_of_dense_modules_names_the_head_too(dense: Path, name: str, tmp_path: Path) -> None:
    """Readers of these formats take every linear layer as packed that such a list doesn't name."""
    model = load(dense, quantization_config=CONFIGS[name](modules_to_not_convert=["k_proj"]))
    model.save_pretrained(tmp_path)
    kept = stored_config(tmp_path)["modules_to_not_convert"]
    assert kept == ["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]
    assert len(packed(load(tmp_path))) == 12


def test_layers_that_eetq_cannot_hold_stay_dense_with_the_reason(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=lowbit.EetqConfig())
    assert set(packed(model)) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert "not made of 64 x 64 tiles" in str(model.hf_quantizer.plan)
    model.save_pretrained(tmp_path / "packed")
    kept = stored_config(tmp_path / "packed")["modules_to_not_convert"]
    assert kept == ["lm_head", *(f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up"))]
    assert torch.equal(tiny.logits(load(tmp_path / "packed"), "llama"), tiny.logits(model, "llama"))


def test_the_bound_of_activations_may_be_changed_when_loading(dense: Path, tmp_path: Path) -> None:
    load(dense, quantization_config=lowbit.FbgemmFp8Config(activation_scale_ub=5.0)).save_pretrained(tmp_path)
    for asked, bound in ((None, 5.0), (lowbit.FbgemmFp8Config(), 5.0), (lowbit.FbgemmFp8Config(0.5), 0.5)):
        model = load(tmp_path, quantization_config=asked)
        assert {layer.spec.activation.bound for layer in packed(model).values()} == {bound}
    narrow, wide = load(tmp_path, quantization_config=lowbit.FbgemmFp8Config(0.5)), load(tmp_path)
    assert not torch.equal(tiny.logits(narrow, "llama"), tiny.logits(wide, "llama"))
    with pytest.raises(PlanError, match="modules_to_not_convert"):
        load(tmp_path, quantization_config=lowbit.FbgemmFp8Config(modules_to_not_convert=["q_proj"]))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        lowbit.EetqConfig(weights="int4")
