"""Adapters of PEFT on packed layers: they train, merge, unmerge and save like on any linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lowbit
import tiny

# PEFT calls by names that Transformers has changed.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

CONFIGS = {
    "nf4": lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: lowbit.GPTQConfig(4, group_size=32),
    "awq": lambda: lowbit.AwqConfig(4, group_size=32),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder)
    return folder


def load(folder: Path, config: str) -> Any:
    return lowbit.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CONFIGS[config](), dtype="float32", device_map="cpu"
    )


def adapted(model: Any) -> Any:
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))


def train(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.arange(3, 19)[None]
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_train_and_the_base_stays(llama: Path, config: str) -> None:
    base = load(llama, config)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base)
    assert base.model.layers[0].gradient_checkpointing
    losses = train(model.train())
    assert losses[-1] < losses[0] - 0.1
    after = model.get_base_model().state_dict()
    for name, tensor in before.items():
        kept = after.get(name, after.get(name.replace("_proj.", "_proj.base_layer.")))
        assert torch.equal(kept, tensor), name


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_saves_and_loads(llama: Path, tmp_path: Path, config: str) -> None:
    model = adapted(load(llama, config))
    train(model, 2)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(llama, config), tmp_path)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)


@pytest.mark.parametrize("config", CONFIGS)
def test_merging_quantizes_the_sum(llama: Path, config: str) -> None:
    model = adapted(load(llama, config))
    train(model, 4)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    base, delta = layer.base_layer.dequantize(torch.float32), layer.get_delta_weight("default").detach()
    with torch.no_grad():
        layer.merge()
    merged = layer.base_layer.dequantize(torch.float32)
    expected = lowbit_quantized(layer.base_layer.spec, base + delta)
    assert torch.equal(merged, expected)
    assert float((merged - base - delta).abs().mean()) < float(delta.abs().mean()) / 2 or config == "int8"
    with torch.no_grad():
        layer.unmerge()
    back = (layer.base_layer.dequantize(torch.float32) - base).abs().mean()
    assert float(back) < float((merged - base).abs().mean()) / 2  # two roundings away from where it was


def lowbit_quantized(spec: lowbit.QuantSpec, weight: torch.Tensor) -> torch.Tensor:
    from lowbit.algorithms import quantize

    return quantize(weight, spec).dequantize(torch.float32)


@pytest.mark.parametrize("config", ["nf4", "int8", "awq"])  # PEFT itself refuses to merge into GPTQ models
def test_merge_and_unload_gives_a_model_that_saves(llama: Path, tmp_path: Path, config: str) -> None:
    model = adapted(load(llama, config))
    train(model, 2)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    again = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", device_map="cpu")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, again.eval()(ids).logits)


def test_dora_and_other_adapters_meet_a_dense_weight(llama: Path) -> None:
    for config in (
        peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ):
        model = peft.get_peft_model(load(llama, "nf4"), config)
        losses = train(model.train(), 3)
        assert losses[-1] < losses[0]


def test_a_weight_of_another_shape_is_refused(llama: Path) -> None:
    layer = load(llama, "nf4").model.layers[0].mlp.down_proj
    with pytest.raises(lowbit.PlanError, match="can't become"):
        layer.weight.data = torch.zeros(3, 3)
