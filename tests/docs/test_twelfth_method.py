"""The method that `docs/twelfth-method.md` adds from outside of the package."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers import auto

import lowbit
from lowbit.algorithms import RoundToNearest
from lowbit.nn import QuantLinear
from lowbit.wire import wires
from snippets import blocks, run_python

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "examples" / "twelfth_method.py"
PAGE = REPOSITORY / "docs" / "twelfth-method.md"
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def twelfth(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(SOURCE.parent)
    module = importlib.import_module("twelfth_method")
    yield module
    module.unregister()


def test_the_page_shows_the_file() -> None:
    assert blocks(PAGE)[0].text == SOURCE.read_text(encoding="utf-8")


def test_it_takes_fewer_than_sixty_lines() -> None:
    lines = [line.strip() for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) < 60


@pytest.mark.usefixtures("twelfth")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(PAGE)[1:]:
        run_python(PAGE, block, namespace)


def test_quantize_save_reload_generate_dequantize(twelfth: Any, small: Path, tmp_path: Path) -> None:
    twelfth.register()
    config = twelfth.PlanesConfig(group_size=32, modules_to_not_convert=["layers.0.self_attn.k_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(small, quantization_config=config)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, QuantLinear)
    assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear

    dense = transformers.AutoModelForCausalLM.from_pretrained(small)
    expected = RoundToNearest().quantize(dense.get_submodule(LAYER).weight.detach(), layer.spec)
    assert layer.quant_tensor().equal(expected)

    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "planes5",
        "group_size": 32,
        "modules_to_not_convert": ["model.layers.0.self_attn.k_proj"],
    }
    checkpoint = lowbit.open_checkpoint(tmp_path)
    assert checkpoint.format == "planes5"
    assert checkpoint.weights[LAYER].equal(expected)

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    tokens = again.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False))
    again.dequantize()
    assert torch.equal(again.get_submodule(LAYER).weight, expected.dequantize(torch.bfloat16))


def test_without_global_registration_of_the_others(twelfth: Any, small: Path, tmp_path: Path) -> None:
    twelfth.register()
    model = lowbit.AutoModelForCausalLM.from_pretrained(small, quantization_config=twelfth.PlanesConfig())
    model.save_pretrained(tmp_path)
    again = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_submodule(LAYER).quant_tensor().equal(model.get_submodule(LAYER).quant_tensor())


def test_unregistering_takes_everything_back(twelfth: Any, small: Path, tmp_path: Path) -> None:
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), wires()
    twelfth.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(small, quantization_config=twelfth.PlanesConfig())
    model.save_pretrained(tmp_path)
    twelfth.unregister()
    assert before == (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), wires())
    with pytest.raises(lowbit.FormatError, match=r"unknown quantization method.*planes5"):
        lowbit.open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="planes5"):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("nibbles", lambda t: t[:, :-1]), ("signs", lambda t: t.to(torch.int8)), ("scales", lambda t: t[:-1])],
)
def test_damaged_tensors_are_refused(twelfth: Any, name: str, damage: Any) -> None:
    wire = twelfth.PlanesWire()
    settings = wire.parse({"group_size": 64})
    tensor = RoundToNearest().quantize(torch.randn(32, 128), wire.spec(settings))
    stored = wire.write(settings, tensor)
    assert wire.read(settings, stored).equal(tensor)
    with pytest.raises(lowbit.FormatError):
        wire.read(settings, stored | {name: damage(stored[name])})


def test_a_wire_without_a_method_says_so(twelfth: Any, small: Path) -> None:
    twelfth.register_wire(twelfth.PlanesWire())
    with pytest.raises(lowbit.PlanError, match="register_method"):
        lowbit.AutoModelForCausalLM.from_pretrained(small, quantization_config=twelfth.PlanesConfig())
