"""Fused experts in files that hold one matrix per expert: some missing, too many, or not alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import FormatError

CONFIGS: dict[str, Callable[[], Any]] = {
    "bitsandbytes-4bit": lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True),
    "bitsandbytes-8bit": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: lowbit.GPTQConfig(bits=4, group_size=32),
    "awq": lambda: lowbit.AwqConfig(group_size=32),
    "hqq": lambda: lowbit.HqqConfig(4, group_size=64),
    "quanto": lambda: lowbit.QuantoConfig("int8"),
    "torchao": lambda: lowbit.TorchAoConfig("int8_weight_only"),
    "compressed-tensors": lambda: lowbit.CompressedTensorsConfig(
        config_groups={"FP8_DYNAMIC": ["Linear"]}, ignore=["lm_head"]
    ),
    "fbgemm_fp8": lowbit.FbgemmFp8Config,
}
EXPERT = "model.layers.0.mlp.experts.1.gate_proj"
Tensors = dict[str, torch.Tensor]


def write(folder: Path, method: str) -> Tensors:
    """A tiny gpt-oss, packed: its experts are transposed and interleaved in memory and have biases."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        vocab_size=64,
        pad_token_id=0,
    )
    transformers.GptOssForCausalLM(config).save_pretrained(folder / "dense")
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=CONFIGS[method](), device_map="cpu"
    )
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def refuse(folder: Path, tensors: Tensors, match: str) -> None:
    from lowbit.wire.store import read_header

    header = read_header(folder / "model.safetensors")[1]
    save_file(tensors, folder / "model.safetensors", metadata=header)
    with pytest.raises(FormatError, match=match):
        lowbit.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("method", CONFIGS)
def test_experts_with_one_missing(method: str, tmp_path: Path) -> None:
    tensors = write(tmp_path, method)
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{EXPERT}.")}
    assert len(left) < len(tensors)
    refuse(tmp_path, left, r"gate_up_proj of .*one missing.*found 7 of 8.*also model\.layers.*experts\.1\.gate_proj\)")


def test_one_experts_scale_is_missing(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq")
    del tensors[f"{EXPERT}.scales"]
    refuse(tmp_path, tensors, rf"{EXPERT}\.scales.*lacks a tensor")


def test_an_expert_that_is_not_like_the_others(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq")
    tensors[f"{EXPERT}.scales"] = tensors[f"{EXPERT}.scales"].bfloat16()
    refuse(tmp_path, tensors, r"experts\.\*\.gate_proj: .*expert 1 is not as the first.*scales in torch.bfloat16")


def test_an_expert_of_another_size(tmp_path: Path) -> None:
    tensors = write(tmp_path, "fbgemm_fp8")
    for part in ("weight", "weight_scale"):
        tensors[f"{EXPERT}.{part}"] = tensors[f"{EXPERT}.{part}"][:32].contiguous()
    refuse(tmp_path, tensors, r"expert 1 is not as the first.*\[32, 64\]")


def test_experts_of_another_model(tmp_path: Path) -> None:
    tensors = write(tmp_path, "fbgemm_fp8")
    for name in [name for name in tensors if ".gate_proj.weight" in name]:
        tensors[name] = tensors[name][:32].contiguous()
    refuse(tmp_path, tensors, r"the weights are not the module's.*4 of \[32, 64\].*4 of \[64, 64\]")


def test_more_experts_than_the_model_has(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq")
    more = {name.replace("experts.1", "experts.4"): t.clone() for name, t in tensors.items() if EXPERT in name}
    refuse(tmp_path, tensors | more, r"experts\.4\.gate_proj.*an expert that the model doesn't have.*found 4.*0\.\.3")


def test_an_expert_under_two_names(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq")
    for other in (EXPERT.replace("gate_proj", "w1"), EXPERT.replace("experts.1", "experts.01")):
        more = {name.replace(EXPERT, other): t.clone() for name, t in tensors.items() if name.startswith(EXPERT)}
        refuse(tmp_path, tensors | more, r"go by different names")


def test_a_bias_is_missing(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq")
    del tensors[f"{EXPERT}.bias"]
    refuse(tmp_path, tensors, r"gate_up_proj_bias of .*biases of experts are missing.*'gate_proj': 3")


def test_packed_weights_for_what_is_no_expert(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq")
    more = {
        name.replace("gate_proj", "other_proj"): t.clone() for name, t in tensors.items() if name.startswith(EXPERT)
    }
    refuse(tmp_path, tensors | more, r"other_proj.*a module that lowbit can't hold packed.*no such module")
