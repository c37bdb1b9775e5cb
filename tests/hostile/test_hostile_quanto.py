"""quanto files, maps and configs that are wrong: one error that says what and where."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.algorithms.quanto import WeightRange
from lowbit.errors import FormatError, LowbitError, PlanError
from lowbit.wire.quanto import QMAP, QuantoSettings, QuantoWire

WIRE = QuantoWire()
SHAPE = (24, 160)
FOUR = QuantoSettings("qint4", shapes={"": SHAPE})
EIGHT = QuantoSettings("qint8")
FLOAT = QuantoSettings("qfloat8_e4m3fn")
ROUNDED = QuantoSettings("qint8", "qint8")
load = lowbit.AutoModelForCausalLM.from_pretrained


def stored(settings: QuantoSettings) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    plain = QuantoSettings(settings.weights)
    return WIRE.write(plain, WeightRange().quantize(torch.randn(SHAPE), WIRE.spec_for(plain, SHAPE, torch.float32)))


@pytest.mark.parametrize(
    ("settings", "name", "tensor", "match"),
    [
        (FOUR, "weight._data._data", torch.zeros(60, 33, dtype=torch.uint8), "_data._data: wrong shape"),
        (FOUR, "weight._data._data", torch.zeros(59, 32, dtype=torch.uint8), "_data._data: wrong shape"),
        (FOUR, "weight._data._data", torch.zeros(60, 32, dtype=torch.int8), "_data._data: wrong dtype"),
        (FOUR, "weight._data._data", torch.zeros(60, 32), "_data._data: wrong dtype"),
        (FOUR, "weight._data._data", torch.zeros(1920, dtype=torch.uint8), "_data._data: wrong number"),
        (FOUR, "weight._scale", torch.ones(119, 1), "_scale: wrong shape"),
        (FOUR, "weight._scale", torch.ones(120, 1, dtype=torch.float64), "_scale: wrong dtype"),
        (FOUR, "weight._scale", torch.ones(120, 1, dtype=torch.int32), "_scale: wrong dtype"),
        (FOUR, "weight._scale", torch.ones(()), "_scale: wrong number"),
        (FOUR, "weight._shift", torch.ones(1, 120), "_shift: wrong shape"),
        (FOUR, "weight._shift", torch.ones(120, 1, dtype=torch.float16), "_shift: wrong dtype"),
        (FOUR, "weight._shift", torch.ones(120, 1, dtype=torch.int32), "_shift: wrong dtype"),
        (FOUR, "weight._shift", torch.full((120, 1), 16, dtype=torch.uint8), "_shift: a zero point is out of range"),
        (FOUR, "weight._shift", torch.full((120, 1), -1, dtype=torch.int8), "_shift: a zero point is out of range"),
        (EIGHT, "weight._data", torch.zeros(SHAPE, dtype=torch.uint8), "_data: wrong dtype"),
        (EIGHT, "weight._data", torch.zeros(24, 160, 1, dtype=torch.int8), "_data: wrong number"),
        (EIGHT, "weight._data", torch.zeros(SHAPE).to(torch.float8_e4m3fn), "_data: wrong dtype"),
        (EIGHT, "weight._scale", torch.ones(()), "_scale: wrong shape"),
        (EIGHT, "weight._scale", torch.ones(24), "_scale: wrong shape"),
        (EIGHT, "weight._scale", torch.ones(1, 160), "_scale: wrong shape"),
        (FLOAT, "weight._data", torch.zeros(SHAPE).to(torch.float8_e5m2), "_data: wrong dtype"),
        (ROUNDED, "input_scale", torch.ones(1), "input_scale: wrong shape"),
        (ROUNDED, "input_scale", torch.ones((), dtype=torch.int8), "input_scale: wrong dtype"),
        (ROUNDED, "output_scale", torch.ones(24, 1), "output_scale: wrong shape"),
    ],
)
def test_tensors_that_contradict_each_other(
    settings: QuantoSettings, name: str, tensor: torch.Tensor, match: str
) -> None:
    with pytest.raises(FormatError, match=match):
        WIRE.read(settings, stored(settings) | {name: tensor})


def test_types_against_the_tensors() -> None:
    for declared, held in ((FOUR, EIGHT), (EIGHT, FOUR), (FLOAT, EIGHT), (EIGHT, FLOAT)):
        with pytest.raises(FormatError, match="_data"):
            WIRE.read(declared, stored(held))
    with pytest.raises(FormatError, match="wrong shape"):
        WIRE.read(QuantoSettings("qint2", shapes={"": SHAPE}), stored(FOUR))


@pytest.mark.parametrize("value", [0.0, 1e-42, float("inf"), float("nan")])
@pytest.mark.parametrize("settings", [FOUR, EIGHT, FLOAT], ids=lambda settings: settings.weights)
def test_scales_that_are_zero_subnormal_or_infinite(settings: QuantoSettings, value: float) -> None:
    """They are what the file says, as quanto would have it: no error, no other weight."""
    tensors = stored(settings)
    scale = torch.full_like(tensors["weight._scale"], value)
    ones = {"weight._scale": torch.ones_like(scale)}
    shift = {"weight._shift": torch.zeros_like(scale)} if settings is FOUR else {}
    codes = WIRE.read(settings, tensors | ones | shift).dequantize()
    read = WIRE.read(settings, tensors | shift | {"weight._scale": scale}).dequantize()
    assert torch.equal(read.nan_to_num(), (codes * value).nan_to_num())


@given(st.data())
def test_random_damage_is_either_read_or_named(data: st.DataObject) -> None:
    settings = data.draw(st.sampled_from([FOUR, EIGHT, FLOAT, ROUNDED, QuantoSettings("qint4")]))
    tensors = stored(settings)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, torch.float16, torch.float32]))
        shape = data.draw(
            st.sampled_from([tuple(tensors[name].shape), (), (0, 0), (1, 1), (24, 1), (120, 1), (0, 160)])
        )
        tensors[name] = torch.full(shape, data.draw(st.sampled_from([0, 1, 15, 16, 127])), dtype=dtype)
    with contextlib.suppress(LowbitError):
        WIRE.read(settings, tensors).dequantize()


CONFIGS: list[tuple[Any, str]] = [
    *(({"weights": value}, "weights is out of range") for value in ("int3", "qint4", "", 4, None, ["int4"], True)),
    *(({"activations": value}, "activations is out of range") for value in ("int4", "qint8", 8, ["int8"], True)),
    *(({"modules_to_not_convert": value}, "is a list of names") for value in ("lm_head", [3], {"a": 1}, 7)),
    *(({"qmap": value}, "non-empty object") for value in ({}, [], "x", 7)),
    ({"qmap": {"a": "qint4"}}, "a: a module's types are an object"),
    ({"qmap": {"a": {"weights": "qint3"}}}, "a: unknown type of weights"),
    ({"qmap": {"a": {"weights": ["qint4"]}}}, "a: unknown type of weights"),
    ({"qmap": {"a": {"weights": "__import__('os').abort()"}}}, "a: unknown type of weights"),
    ({"qmap": {"a": {"weights": "qint4", "activations": "qint4"}}}, "a: unknown type of activations"),
    ({"qmap": {"a": {"weights": "qint4", "activations": {}}}}, "a: unknown type of activations"),
    ({"qmap": {"norm": {"weights": "none", "activations": "qint8"}}}, "norm: .* not linear"),
]


@pytest.mark.parametrize(("config", "match"), CONFIGS, ids=lambda value: str(value)[:40])
def test_configs(config: dict[str, Any], match: str) -> None:
    config = {"quant_method": "quanto", **config}
    if config.get("weights", "int8") is None:
        config["weights"] = 0
    with pytest.raises(FormatError, match=match):
        WIRE.parse(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quanto")
    config = transformers.LlamaConfig(
        hidden_size=160, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    load(folder / "dense", quantization_config=lowbit.QuantoConfig("int4")).save_pretrained(folder / "packed")
    data = json.loads((folder / "packed" / "config.json").read_text())
    del data["quantization_config"]  # quanto writes none
    (folder / "packed" / "config.json").write_text(json.dumps(data))
    return folder / "packed"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        for path in checkpoint.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return make


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1', "\ud800", '{"a":' * 10**5, "7"])
def test_maps_that_are_no_json(copy: Callable[[], Path], text: str) -> None:
    folder = copy()
    (folder / QMAP).write_bytes(text.encode("utf-8", "surrogatepass"))
    for attempt in (load, lowbit.open_checkpoint):
        with pytest.raises(FormatError, match=QMAP):
            attempt(folder)


def test_strings_of_sizes_and_strides_are_never_evaluated(copy: Callable[[], Path]) -> None:
    """quanto flattens its tensors with their sizes as text; what a header says of them has no effect."""
    folder = copy()
    before = load(folder)
    tensors = load_file(folder / "model.safetensors")
    code = "__import__('os').abort()"
    hostile = {"size": code, "stride": code, "bits": "64", "axis": code, "qtype": code}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **hostile})
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, before(ids).logits)


def test_a_map_of_other_types_than_the_tensors(copy: Callable[[], Path]) -> None:
    folder = copy()
    qmap = json.loads((folder / QMAP).read_text())
    (folder / QMAP).write_text(json.dumps({name: {**entry, "weights": "qint2"} for name, entry in qmap.items()}))
    with pytest.raises(FormatError, match=r"layers\.0\..*_data\._data: wrong shape"):
        load(folder)


def test_the_shape_is_the_models(copy: Callable[[], Path]) -> None:
    folder = copy()
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "intermediate_size": 512}))
    for attempt in (load, lambda path: lowbit.open_checkpoint(path).plan):
        with pytest.raises(FormatError, match=r"mlp\.\w+\.weight\._data\._data.*: wrong shape"):
            attempt(folder)


def test_without_a_model_that_anybody_knows(copy: Callable[[], Path]) -> None:
    folder = copy()
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "model_type": "nobody"}))
    with pytest.raises(FormatError, match="how long the rows"):
        _ = lowbit.open_checkpoint(folder).plan


def test_activations_are_not_measured_while_loading(checkpoint: Path) -> None:
    dense = checkpoint.parent / "dense"
    for config in (
        lowbit.QuantoConfig("int8", activations="int8"),
        lowbit.QuantoConfig(qmap={"a": {"weights": "qint8", "activations": "qfloat8"}, "b": {"weights": "qint4"}}),
    ):
        with pytest.raises(PlanError, match="have to be measured"):
            load(dense, quantization_config=config)


def test_a_config_that_contradicts_the_map(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="weights='int4'"):
        load(checkpoint, quantization_config=lowbit.QuantoConfig("int2"))


def test_rounded_outputs_of_other_layers(copy: Callable[[], Path]) -> None:
    """quanto rounds those of LayerNorm; they must not be left out silently."""
    folder = copy()
    tensors = load_file(folder / "model.safetensors") | {"model.norm.output_scale": torch.ones(())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.norm\.output_scale: the outputs of a layer"):
        load(folder)
