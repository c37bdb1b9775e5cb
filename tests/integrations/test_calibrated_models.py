"""`from_pretrained` with a dataset in the quantization config: what a run of the calibration gives, loaded."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.calibration.data import DataConfig, load_calibration
from lowbit.calibration.runner import Runner
from lowbit.core import QuantTensor
from lowbit.errors import PlanError
from lowbit.integrations.transformers.calibrate import CalibratedRun
from lowbit.integrations.transformers.calibrated_methods import Settings, calibrated_method
from lowbit.nn import QuantLinear

SETTINGS = Settings()
LENGTH = 64


@pytest.fixture(scope="module")
def texts(small: Path) -> list[str]:
    text = (small.parent / "sample.txt").read_text(encoding="utf-8")
    return [text[start : start + 400] for start in range(0, 2400, 400)]


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(small)


@pytest.fixture(scope="module")
def short(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's first block, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "short"
    transformers.AutoModelForCausalLM.from_pretrained(small, num_hidden_layers=1).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def moe(small: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of three experts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 8192}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))
    folder = tmp_path_factory.mktemp("models") / "moe"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run_of(
    method: str, settings: Settings, config: Any, source: Path, texts: list[str], tokenizer: Any, job: Path
) -> CalibratedRun:
    """The same by the API, not yet done."""
    data = load_calibration(texts, tokenizer, DataConfig(samples=128, length=LENGTH))
    return CalibratedRun(source, config, calibrated_method(method, settings), data, job, torch.device("cpu"))


def packed(model: Any) -> dict[str, QuantTensor]:
    return {name: module.quant_tensor() for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def gptq(texts: Any = None, tokenizer: Any = None, **options: Any) -> Any:
    return lowbit.GPTQConfig(
        **{"bits": 4, "group_size": 64, "model_seqlen": LENGTH, "dataset": texts, "tokenizer": tokenizer, **options}
    )


def awq(texts: Any = None, tokenizer: Any = None, **options: Any) -> Any:
    return lowbit.AwqConfig(
        **{"bits": 4, "group_size": 64, "model_seqlen": LENGTH, "dataset": texts, "tokenizer": tokenizer, **options}
    )


CASES: dict[str, tuple[Any, str, dict[str, Any], Settings]] = {
    "gptq": (gptq, "gptq", {}, replace(SETTINGS, symmetric=True, damp_percent=0.1)),
    "gptq act-order": (
        gptq,
        "gptq",
        {"desc_act": True, "sym": False, "damp_percent": 0.05, "true_sequential": False},
        replace(SETTINGS, desc_act=True, damp_percent=0.05, true_sequential=False),
    ),
    "awq": (awq, "awq", {}, SETTINGS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_a_run(
    auto: Any, short: Path, texts: list[str], tokenizer: Any, tmp_path: Path, scratch: Path, name: str
) -> None:
    make, method, options, settings = CASES[name]
    dtype = torch.float16 if method == "awq" else torch.bfloat16
    model = auto.from_pretrained(short, dtype=dtype, quantization_config=make(texts, tokenizer, **options))
    assert list(scratch.iterdir()) == []

    run = run_of(method, settings, make(**options), short, texts, tokenizer, tmp_path / "job")
    run.run()
    results = run.results()
    found = packed(model)
    assert found.keys() == {unit.name for unit in run.units}
    for layer, tensor in found.items():
        assert tensor.equal(results.unit(layer))
        assert tensor.spec.grouping.permuted == (name == "gptq act-order")
    assert bool(results.dense_names) == (method == "awq")
    for parameter in results.dense_names:
        assert torch.equal(model.get_parameter(parameter), results.dense(parameter).to(dtype))
    run.close()

    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert all(tensor.equal(found[layer]) for layer, tensor in packed(again).items())
    ids = tokenizer(texts[0][:200], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        dense = lowbit.AutoModelForCausalLM.from_pretrained(short, dtype=dtype)(ids).logits
    assert float((expected - dense).norm() / dense.norm()) < 0.25


def test_norms_that_awq_scaled_are_in_the_model(short: Path, texts: list[str], tokenizer: Any) -> None:
    dense = lowbit.AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32)
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        short, dtype=torch.float32, quantization_config=awq(texts, tokenizer)
    )
    for name in ("input_layernorm", "post_attention_layernorm"):
        before = dense.get_parameter(f"model.layers.0.{name}.weight")
        assert not torch.allclose(model.get_parameter(f"model.layers.0.{name}.weight"), before, rtol=0.05)
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)


def test_each_expert_gets_its_own(moe: Path, texts: list[str], tokenizer: Any, tmp_path: Path, scratch: Path) -> None:
    options = {"group_size": 32}
    model = lowbit.AutoModelForCausalLM.from_pretrained(moe, quantization_config=gptq(texts, tokenizer, **options))
    assert list(scratch.iterdir()) == []
    settings = replace(SETTINGS, symmetric=True, damp_percent=0.1)
    run = run_of("gptq", settings, gptq(**options), moe, texts, tokenizer, tmp_path / "job")
    run.run()
    (tmp_path / "written").mkdir()
    run.write(tmp_path / "written")
    run.close()
    model.save_pretrained(tmp_path / "saved")
    one, other = (lowbit.open_checkpoint(tmp_path / name).weights for name in ("written", "saved"))
    experts = [name for name in one if ".experts." in name]
    assert len(experts) == 3 * 3
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_ready_ids_need_no_tokenizer(short: Path, texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(short, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    ids = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    model = lowbit.AutoModelForCausalLM.from_pretrained(bare, quantization_config=gptq(ids))
    assert model.config.quantization_config.bits == 4
    with pytest.raises(PlanError, match="no tokenizer can be loaded"):
        lowbit.AutoModelForCausalLM.from_pretrained(bare, quantization_config=gptq(texts))


def test_static_groups_store_no_group_index(short: Path, texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    config = gptq(texts, tokenizer, desc_act=True, static_groups=True)
    assert config.to_dict()["static_groups"] is True and "static_groups" not in gptq().to_dict()
    model = lowbit.AutoModelForCausalLM.from_pretrained(short, quantization_config=config)
    model.save_pretrained(tmp_path)
    specs = {weight.spec for weight in lowbit.open_checkpoint(tmp_path).weights.values()}
    assert specs and not any(spec.grouping.permuted for spec in specs)


def test_a_dataset_by_name_without_the_hub(
    short: Path, tokenizer: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"no route to the hub; .* a local text file .* works as well"):
        lowbit.AutoModelForCausalLM.from_pretrained(short, quantization_config=gptq("wikitext2", tokenizer))
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, PlanError("no")])
def test_nothing_is_left_after_an_error(
    auto: Any,
    short: Path,
    texts: list[str],
    tokenizer: Any,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Any,
) -> None:
    """Of the scratch folder, and of what is changed around the making of a model."""

    def fail(self: Runner, *args: Any) -> None:
        raise error

    monkeypatch.setattr(Runner, "run", fail)
    before = transformers.PreTrainedModel.tie_weights, torch.get_default_dtype()
    with pytest.raises(error if isinstance(error, type) else type(error)):
        auto.from_pretrained(short, quantization_config=gptq(texts, tokenizer))
    assert list(scratch.iterdir()) == []
    assert (transformers.PreTrainedModel.tie_weights, torch.get_default_dtype()) == before
    assert torch.empty(0).device.type == "cpu"


def test_nothing_is_left_when_loading_fails_behind_the_calibration(
    short: Path, texts: list[str], tokenizer: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.integrations.transformers.on_load import Finished

    def fail(self: Finished, *args: Any) -> QuantTensor:
        raise PlanError("the device is gone")

    monkeypatch.setattr(Finished, "quantize", fail)
    with pytest.raises(PlanError, match="the device is gone"):
        lowbit.AutoModelForCausalLM.from_pretrained(short, quantization_config=gptq(texts, tokenizer))
    assert list(scratch.iterdir()) == []


def test_rotated_models_compute_the_same(short: Path, texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, rotate=True)
    run = run_of("gptq", settings, gptq(bits=8, sym=False), short, texts, tokenizer, tmp_path / "job")
    run.run()
    (tmp_path / "model").mkdir()
    run.write(tmp_path / "model")
    run.close()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").tie_word_embeddings is False
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    dense = lowbit.AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.allclose(model.lm_head.weight, model.model.embed_tokens.weight, atol=1e-2)
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))
    ids = tokenizer(texts[0][:200], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found, expected = model(ids).logits, dense(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.03
