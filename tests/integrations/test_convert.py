"""Converting checkpoints, on two layers with random weights: every bit, or a reason and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
import tiny
from lowbit.algorithms import RoundToNearest, integer_spec, quantize
from lowbit.core import QuantTensor
from lowbit.errors import PlanError
from lowbit.integrations.checkpoint import open_checkpoint
from lowbit.integrations.convert import Conversion, Target
from lowbit.wire import wire_named
from lowbit.wire.awq import AwqSettings
from lowbit.wire.gptq import GptqSettings

Make = Callable[..., Path]
NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder, torch.float16)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def make(llama: Path, tmp_path: Path) -> Make:
    """A checkpoint of the tiny model, quantized with a config."""

    def quantized(config: Any, name: str = "source") -> Path:
        model = lowbit.AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
        model.save_pretrained(tmp_path / name)
        for file in ("tokenizer_config.json", "LICENSE"):
            (tmp_path / name / file).write_bytes((llama / file).read_bytes())
        return tmp_path / name

    return quantized


def convert(source: Path, to: str, name: str = "", shard_bytes: int = 2 * 10**9, **options: Any) -> Path:
    conversion = Conversion(open_checkpoint(source), Target.parse(to, **options))
    conversion.prepare()
    target = source.with_name(name or to.replace(":", "-"))
    target.mkdir()
    conversion.run(target, shard_bytes=shard_bytes)
    return target


def assert_same_model(left: Path, right: Path) -> None:
    before, after = open_checkpoint(left), open_checkpoint(right)
    assert list(before.weights) == list(after.weights)
    for name, tensor in before.weights.items():
        for dtype in (torch.float32, tensor.spec.dtype):
            assert torch.equal(tensor.dequantize(dtype), after.weights[name].dequantize(dtype)), name
    assert before.dense == after.dense
    for name in before.dense:
        assert torch.equal(before.files.tensor(name), after.files.tensor(name))


def assert_same_files(left: Path, right: Path) -> None:
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("way", [("awq", "gptq"), ("gptq_v2", "hqq", "awq:gemv", "gptq"), ("hqq", "gptq:v1")])
def test_there_and_back_again_gives_the_same_bytes(make: Make, sym: bool, way: tuple[str, ...]) -> None:
    first = source = make(lowbit.GPTQConfig(bits=4, group_size=32, sym=sym))
    for number, to in enumerate(way):
        source = convert(source, to, str(number))
        assert_same_model(first, source)
    assert_same_files(first, source)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_go_through_hqq(make: Make, bits: int) -> None:
    first = make(lowbit.GPTQConfig(bits=bits, group_size=64, sym=False))
    back = convert(convert(first, "hqq"), "gptq", "back")
    assert_same_files(first, back)


def test_int8_rows_go_through_every_format_that_has_them(make: Make) -> None:
    first = source = make(lowbit.EetqConfig("int8"))
    wanted = tiny.logits(lowbit.AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32), "llama")
    for number, to in enumerate(("torchao", "quanto", "gptq", "compressed-tensors", "hqq", "eetq")):
        source = convert(source, to, str(number))
        assert open_checkpoint(source).format == to
        assert_same_model(first, source)
        model = lowbit.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert torch.equal(tiny.logits(model, "llama"), wanted), to
    assert_same_files(first, source)


def test_what_was_converted_loads_and_computes_the_same(make: Make) -> None:
    source = make(lowbit.GPTQConfig(bits=4, group_size=32, sym=False))
    target = convert(source, "awq")
    models = [lowbit.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source, target)]
    assert torch.equal(tiny.logits(models[0], "llama"), tiny.logits(models[1], "llama"))
    assert (target / "LICENSE").read_text() == "free"
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in source.iterdir())
    assert (target / "model.safetensors").stat().st_mode == (target / "config.json").stat().st_mode


def test_symmetric_weights_say_so_in_the_new_config(make: Make) -> None:
    source = make(lowbit.GPTQConfig(bits=4, group_size=32, sym=True))
    assert open_checkpoint(convert(source, "awq")).settings.zero_point is False
    assert open_checkpoint(convert(source, "gptq_v2")).settings == GptqSettings(4, 32, version=2)
    mixed = make(lowbit.GPTQConfig(bits=4, group_size=32, sym=False), "mixed")
    assert open_checkpoint(convert(mixed, "awq", "asym")).settings.zero_point is True


def test_modules_that_stayed_dense_are_named(make: Make) -> None:
    source = make(lowbit.GPTQConfig(bits=4, group_size=32, modules_to_not_convert=["k_proj"]))
    dense = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]
    assert (
        json.loads((convert(source, "awq") / "config.json").read_text())["quantization_config"][
            "modules_to_not_convert"
        ]
        == dense
    )
    rules = json.loads((convert(source, "gptq_v2") / "config.json").read_text())["quantization_config"]["dynamic"]
    assert len(rules) == 2 and all(pattern.startswith("-:^model") for pattern in rules)
    nested = make(lowbit.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["k_proj"]), "fp4")
    skip = json.loads((convert(nested, "bitsandbytes-4bit", "again") / "config.json").read_text())
    assert skip["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", *dense]


def test_nested_statistics_are_kept(make: Make) -> None:
    config = lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float16"
    )
    source = make(config)
    assert_same_files(source, convert(source, "bitsandbytes-4bit"))


def test_refused_with_the_first_weight_and_the_reason(make: Make) -> None:
    source = make(lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    with pytest.raises(PlanError, match=r"model\.layers\.0\.\S+ can't be spelled in 'gptq': the codes are nf4, not"):
        convert(source, "gptq")
    int8 = make(lowbit.BitsAndBytesConfig(load_in_8bit=True), "int8")
    with pytest.raises(PlanError, match="a constant is multiplied with after the scale"):
        convert(int8, "gptq", "other")


def test_requantize_says_what_it_costs(make: Make) -> None:
    source = make(lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    conversion = Conversion(open_checkpoint(source), Target.parse("gptq", requantize=True))
    conversion.prepare()
    (target := source.with_name("gptq")).mkdir()
    cost = conversion.run(target)
    assert (cost.weights, cost.dense) == (14, 0)
    errors, sizes = [], []
    after = open_checkpoint(target).weights
    for name, tensor in open_checkpoint(source).weights.items():
        errors.append((after[name].dequantize() - tensor.dequantize()).abs())
        sizes.append(tensor.dequantize().abs())
    assert cost.most == max(float(error.max()) for error in errors) > 0
    assert cost.mean == pytest.approx(
        sum(float(e.double().sum()) for e in errors) / sum(float(s.double().sum()) for s in sizes)
    )
    assert 0.02 < cost.mean < 0.5
    worst = list(after)[max(range(14), key=lambda number: float(errors[number].max()))]
    assert cost.where == worst


def test_dense_weights_have_the_bits(make: Make, tmp_path: Path) -> None:
    source = make(lowbit.GPTQConfig(bits=4, group_size=32, sym=False))
    weights = open_checkpoint(source).weights
    for dtype in (None, torch.float32):
        target = convert(source, "dense", f"dense-{dtype}", dtype=dtype)
        stored = load_file(target / "model.safetensors")
        config = json.loads((target / "config.json").read_text())
        assert "quantization_config" not in config
        wanted = dtype or torch.float16
        assert config.get("dtype", config.get("torch_dtype")) == str(wanted).removeprefix("torch.")
        for name, tensor in weights.items():
            assert torch.equal(stored[f"{name}.weight"], tensor.dequantize(wanted))
        assert {tensor.dtype for tensor in stored.values()} == {wanted}


def test_conv1d_gets_its_own_orientation_back(tmp_path: Path) -> None:
    dense = tiny.save("gpt2", tmp_path / "gpt2")
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gpt2", quantization_config=lowbit.GPTQConfig(bits=8, group_size=32)
    )
    model.save_pretrained(tmp_path / "source")
    again = lowbit.AutoModelForCausalLM.from_pretrained(convert(tmp_path / "source", "dense"))
    weight = again.transformer.h[0].attn.c_attn.weight
    assert weight.shape == dense.transformer.h[0].attn.c_attn.weight.shape == (64, 192)
    assert torch.allclose(weight, dense.transformer.h[0].attn.c_attn.weight, atol=0.01)


def test_shards(make: Make) -> None:
    source = make(lowbit.GPTQConfig(bits=4, group_size=32))
    target = convert(source, "awq", shard_bytes=20_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(path.name for path in target.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {file: sum(t.nbytes for t in load_file(target / file).values()) for file in files}
    assert all(size <= 20_000 or len(load_file(target / file)) == 1 for file, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert_same_model(source, target)
    assert_same_files(source, convert(target, "gptq"))


def test_an_unknown_format_or_variant() -> None:
    with pytest.raises(PlanError, match="unknown format 'gguff'; there are dense, bitsandbytes-4bit"):
        Target.parse("gguff")
    with pytest.raises(PlanError, match="a dtype is for 'dense'"):
        Target.parse("awq", dtype=torch.float16)


def test_an_unknown_variant(make: Make) -> None:
    source = make(lowbit.GPTQConfig(bits=4, group_size=32))
    for to, message in (("awq:gems", "unknown variant of AWQ"), ("bitsandbytes-8bit:x", "has no variants")):
        with pytest.raises(PlanError, match=message):
            convert(source, to)


def write(folder: Path, wire: str, settings: Any, tensors: dict[str, QuantTensor], **more: torch.Tensor) -> Path:
    """A checkpoint without a model."""
    folder.mkdir()
    spelled = wire_named(wire)
    stored = {}
    for name, tensor in tensors.items():
        written = spelled.write(spelled.of(settings, name), tensor)
        stored |= {f"{name}.{suffix}": value for suffix, value in written.items()}
    save_file(stored | more, folder / "model.safetensors")
    config = {"model_type": "unheard_of", "quantization_config": spelled.config(settings)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_one_layout_for_all_where_weights_differ(tmp_path: Path) -> None:
    """8 bits hold 4, groups of 64 are two of 32: formats with one layout take the common one."""
    specs = [integer_spec(4, 32), integer_spec(8, 64), integer_spec(4, 32)]
    tensors = {f"layers.{n}.proj": quantize(torch.randn(32, 64), spec) for n, spec in enumerate(specs)}
    own = {name: GptqSettings(tensor.spec.bits, tensor.spec.grouping.cols, False) for name, tensor in tensors.items()}
    settings = wire_named("gptq").join(own, [])
    source = write(tmp_path / "source", "gptq", settings, tensors)
    assert_same_model(source, convert(source, "gptq_v2"))
    with pytest.raises(PlanError, match=r"layers\.1\.proj"):
        convert(source, "awq")


def test_act_order_is_refused_where_there_is_none(tmp_path: Path) -> None:
    tensor = RoundToNearest().quantize(torch.randn(32, 64), integer_spec(4, 32))
    index = (torch.arange(64) % 2).to(torch.int32)
    permuted = QuantTensor(integer_spec(4, 32, permuted=True), {**tensor.tensors, "group_index": index}, (32, 64))
    settings = GptqSettings(4, 32, symmetric=False, desc_act=True)
    source = write(tmp_path / "source", "gptq", settings, {"layers.0.proj": permuted})
    assert open_checkpoint(convert(source, "gptq_v2")).weights["layers.0.proj"].equal(permuted)
    with pytest.raises(PlanError, match=r"layers\.0\.proj can't be spelled in 'awq': its groups are not of"):
        convert(source, "awq")
    rounded = open_checkpoint(convert(source, "awq", "rounded", requantize=True)).weights["layers.0.proj"]
    assert not rounded.spec.grouping.permuted
    assert torch.allclose(rounded.dequantize(), permuted.dequantize(), atol=0.4)


def test_shapes_that_a_format_cannot_hold(tmp_path: Path) -> None:
    tensors = {name: symmetric(torch.randn(32, cols)) for name, cols in (("a.x", 64), ("a.y", 96))}
    source = write(tmp_path / "source", "gptq", GptqSettings(4, 32), tensors)
    with pytest.raises(PlanError, match=r"a\.y can't be spelled in 'awq': 32 x 96 is not a multiple of 4 x 64"):
        convert(source, "awq:gemv_fast")
    conversion = Conversion(open_checkpoint(source), Target.parse("awq:gemv_fast", requantize=True))
    conversion.prepare()
    (target := tmp_path / "target").mkdir()
    cost = conversion.run(target)
    assert (cost.weights, cost.dense) == (0, 1)
    checkpoint = open_checkpoint(target)
    assert torch.equal(checkpoint.weights["a.x"].dequantize(), tensors["a.x"].dequantize())
    assert torch.equal(checkpoint.files.tensor("a.y.weight"), tensors["a.y"].dequantize(torch.float16))


def symmetric(weight: torch.Tensor) -> QuantTensor:
    return RoundToNearest(symmetric=True).quantize(weight, integer_spec(4, 32))


def test_activation_scales_are_not_lost(tmp_path: Path) -> None:
    tensor = quantize(torch.randn(32, 64), integer_spec(4, 32))
    source = write(
        tmp_path / "source",
        "awq",
        AwqSettings("gemm", 32),
        {"h.0.mlp.up": tensor},
        **{"h.0.mlp.act.scales": torch.ones(32)},
    )
    convert(source, "awq:gemv")
    for to in ("gptq", "dense"):
        with pytest.raises(PlanError, match="divides activations"):
            convert(source, to)
