"""What holds for every format: it saves and loads, compiles, generates, trains under adapters, and can be given up."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import formats
import lowbit
from lowbit.nn import QuantLinear
from lowbit.nn.packed import PackedModule

IDS = torch.arange(3, 15)[None]
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a format, written when it is first asked for."""
    root = tmp_path_factory.mktemp("formats")
    formats.make_dense(root / "dense")

    def checkpoint(name: str) -> Path:
        if not (root / name).exists():
            formats.make_checkpoint(name, root / "dense", root / name)
        return root / name

    return checkpoint


@pytest.fixture
def load(folder: Callable[[str], Path]) -> Load:
    def from_checkpoint(name: str, **kwargs: Any) -> Any:
        options = {"dtype": torch.float32, "device_map": "cpu", **kwargs}
        return lowbit.AutoModelForCausalLM.from_pretrained(folder(name), **options).eval()

    return from_checkpoint


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for part in module.packed_names
    }


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_linear_of_a_block_is_packed(name: str, load: Load) -> None:
    model = load(name)
    layers = [module for path, module in model.named_modules() if path.endswith("_proj")]
    assert len(layers) == 7
    assert all(isinstance(layer, QuantLinear) for layer in layers)
    assert len(model.hf_quantizer.plan.quantized) >= 7
    assert all(layer.quant_tensor().bits_per_weight < 9.5 for layer in layers)
    names = set(model.state_dict())
    assert not any(name.endswith("_proj.weight") for name in names)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_saved_and_loaded_again_it_is_the_same(name: str, load: Load, tmp_path: Path) -> None:
    model = load(name)
    model.save_pretrained(tmp_path)
    again = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu").eval()
    mine, other = packed(model), packed(again)
    assert list(mine) == list(other)
    for part, tensor in mine.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[part].reshape(-1).view(torch.uint8)), part
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_it_compiles_without_a_graph_break(name: str, load: Load) -> None:
    model = load(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("name", formats.FORMATS)
def test_it_generates_with_a_static_cache_and_stays_packed(name: str, load: Load) -> None:
    model = load(name)
    before = model.get_memory_footprint()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, **settings)
    static = model.generate(IDS, cache_implementation="static", **settings)
    assert torch.equal(plain, static)
    assert model.get_memory_footprint() == before
    assert model.hf_quantizer.is_compileable


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", formats.FORMATS)
def test_adapters_train_on_it(name: str, load: Load) -> None:
    base = load(name)
    before = {part: tensor.clone() for part, tensor in packed(base).items()}
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0),
    ).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = {part.replace("base_layer.", "").removeprefix("base_model.model."): tensor
             for part, tensor in packed(model).items()}  # fmt: skip
    for part, tensor in before.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[part].reshape(-1).view(torch.uint8)), part


@pytest.mark.parametrize("name", formats.FORMATS)
def test_gradients_are_those_of_the_dense_weight(name: str, load: Load) -> None:
    layer = next(module for module in load(name).modules() if isinstance(module, QuantLinear))
    inputs = torch.randn(3, layer.in_features, requires_grad=True)
    outputs = layer(inputs)
    along = torch.randn_like(outputs)
    (gradient,) = torch.autograd.grad(outputs, inputs, along)
    torch.testing.assert_close(gradient, along @ layer.dequantize(torch.float32))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_it_can_be_copied_pickled_and_dequantized(name: str, load: Load) -> None:
    model = load(name)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    buffer = io.BytesIO()  # torch's own pickling knows float8
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), expected)
    policies = {layer.spec.activation.kind for layer in model.modules() if isinstance(layer, QuantLinear)}
    dense = model.dequantize()
    assert not packed(dense)
    if policies == {"none"}:
        torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_plain_transformers_loads_it_after_register(name: str, load: Load, folder: Callable[[str], Path]) -> None:
    lowbit.register()
    try:
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32, device_map="cpu")
    finally:
        lowbit.unregister()
    assert torch.equal(logits(plain.eval()), logits(load(name)))
