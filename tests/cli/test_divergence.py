"""Distance from a reference against its definition, in the library and on the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lowbit.bench import compare, perplexity, token_windows
from lowbit.bench.divergence import _divergence
from lowbit.errors import PlanError
from outcome import Lowbit

SEQ_LEN = 160  # more than a strip of 128 positions
MEASURE = ("--seq-len", 64, "--max-windows", 3, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def reference(small: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(small: Path) -> Any:
    """The same with noise in some weights."""
    noisy = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in noisy.model.layers:
            weight = layer.mlp.down_proj.weight
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return noisy


@pytest.fixture(scope="module")
def windows(small: Path) -> Tensor:
    whole = (small.parent / "sample.txt").read_bytes().decode("utf-8")
    return token_windows(transformers.AutoTokenizer.from_pretrained(small), whole, SEQ_LEN)[:3]


@pytest.fixture(scope="module")
def quantized(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import lowbit

    folder = tmp_path_factory.mktemp("quantized")
    config = lowbit.GPTQConfig(4, group_size=64)
    lowbit.AutoModelForCausalLM.from_pretrained(small, quantization_config=config).save_pretrained(folder)
    return folder


def altered(small: Path, folder: Path, **config: Any) -> Path:
    """The embedded model without weights, under a changed configuration."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, folder)
    stored = json.loads((small / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**stored, **config}), encoding="utf-8")
    return folder


def test_is_what_the_definition_says(model: Any, reference: Any, windows: Tensor) -> None:
    divergences, matches = [], 0
    for window in windows:
        with torch.no_grad():
            log_p = reference(window[None]).logits[0].double().log_softmax(-1)
            log_q = model(window[None]).logits[0].double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        matches += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    each = torch.stack(divergences)
    seen: list[int] = []
    found = compare(model, reference, windows, on_windows=seen.append)
    assert seen == [1, 1, 1]
    assert found.positions == windows.numel()
    assert found.divergence == pytest.approx(float(each.mean()), rel=1e-5)
    assert found.divergence > 0.01
    assert found.standard_error == pytest.approx(float(each.mean(1).std()) / math.sqrt(3), rel=1e-4)
    place = math.ceil(0.99 * each.numel()) - 1
    assert found.percentile_99 == pytest.approx(float(each.flatten().sort().values[place]), rel=1e-4)
    assert found.agreement == matches / windows.numel()
    assert 0.5 < found.agreement < 1


def test_perplexities_are_those_of_each(model: Any, reference: Any, windows: Tensor) -> None:
    found = compare(model, reference, windows)
    for measured, alone in (
        (found.model, perplexity(model, windows)),
        (found.reference, perplexity(reference, windows)),
    ):
        assert measured.tokens == alone.tokens
        assert measured.value == pytest.approx(alone.value, rel=1e-6)
    assert found.ratio == pytest.approx(found.model.value / found.reference.value, rel=1e-9)


def test_the_divergence_is_of_the_model_from_the_reference(model: Any, reference: Any, windows: Tensor) -> None:
    there, back = compare(model, reference, windows), compare(reference, model, windows)
    assert abs(there.divergence - back.divergence) > 1e-3 * there.divergence
    assert there.agreement == back.agreement


def test_a_model_doesn_t_differ_from_itself(reference: Any, windows: Tensor) -> None:
    found = compare(reference, reference, windows[:1])
    assert found.divergence == 0
    assert found.percentile_99 == 0
    assert found.agreement == 1
    assert found.ratio == 1
    assert found.standard_error is None


def test_tokens_that_are_ruled_out() -> None:
    never = float("-inf")
    log_p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]).log()
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    assert _divergence(log_p, log_q).tolist() == pytest.approx(expected, rel=1e-6)
    assert _divergence(torch.tensor([[0.0, never]]), torch.tensor([[never, 0.0]])).item() == math.inf


def test_refuses_windows(model: Any, reference: Any) -> None:
    with pytest.raises(PlanError, match="2048 tokens are longer than the model's 1024 positions"):
        compare(model, reference, torch.zeros(1, 2048, dtype=torch.int64))
    with pytest.raises(PlanError, match="0 windows of 16 tokens predict nothing"):
        compare(model, reference, torch.zeros(0, 16, dtype=torch.int64))
    with pytest.raises(PlanError, match="3 windows of 1 tokens predict nothing"):
        compare(model, reference, torch.zeros(3, 1, dtype=torch.int64))


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_refuses_logits_that_are_not_finite(small: Path, reference: Any, windows: Tensor, broken: str) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    torch.nn.init.constant_(other.model.norm.weight, math.nan)
    pair = (other, reference) if broken == "model" else (reference, other)
    with pytest.raises(PlanError, match=f"the {broken} gives NaN or infinite logits"):
        compare(*pair, windows[:1])


def test_refuses_another_vocabulary(small: Path, reference: Any, windows: Tensor) -> None:
    config = transformers.AutoConfig.from_pretrained(small)
    config.vocab_size = 8448
    other = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanError, match="one of 8448 tokens, the reference one of 8192"):
        compare(other, reference, windows[:1])


def test_eval_with_a_reference(lowbit: Lowbit, small: Path, quantized: Path, text: Path) -> None:
    shutil.copy(small / "tokenizer.json", quantized)
    shutil.copy(small / "tokenizer_config.json", quantized)
    words = ("eval", quantized, "--text", text, "--reference", small, *MEASURE)
    outcome = lowbit(*words, "--json")
    assert outcome.err == ""
    report = outcome.json
    assert set(report) == {"perplexity", "tokens", "bits_per_weight", "memory_bytes", "reference"}
    found = report["reference"]
    assert set(found) == {
        "perplexity",
        "perplexity_ratio",
        "positions",
        "kl_divergence",
        "kl_standard_error",
        "kl_percentile_99",
        "top1_agreement",
    }
    alone = {folder: lowbit("eval", folder, "--text", text, *MEASURE, "--json").json for folder in (quantized, small)}
    assert report["perplexity"] == pytest.approx(alone[quantized]["perplexity"], rel=1e-6)
    assert report["bits_per_weight"] == alone[quantized]["bits_per_weight"] < 6
    assert report["memory_bytes"] == alone[quantized]["memory_bytes"]
    assert found["perplexity"] == pytest.approx(alone[small]["perplexity"], rel=1e-6)
    assert found["perplexity_ratio"] == pytest.approx(report["perplexity"] / found["perplexity"])
    assert found["positions"] == 3 * 64
    assert 0.005 < found["kl_divergence"] < 0.2
    assert found["kl_divergence"] < found["kl_percentile_99"]
    assert 0.7 < found["top1_agreement"] < 1

    shown = lowbit(*words).out
    assert f"perplexity        {report['perplexity']:.4f}\n" in shown
    assert f"perplexity {found['perplexity']:.4f} ({small})" in shown
    assert f"KL divergence     {found['kl_divergence']:.5f} ± {found['kl_standard_error']:.5f} nats per token" in shown
    assert f"top-1 agreement   {found['top1_agreement']:.2%}\n" in shown


def test_the_reference_may_be_quantized_and_come_without_a_tokenizer(
    lowbit: Lowbit, small: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(quantized, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    found = lowbit("eval", small, "--text", text, "--reference", folder, *MEASURE, "--json").json["reference"]
    assert found["perplexity_ratio"] < 1
    assert found["kl_divergence"] > 0.005


def test_gguf_files(lowbit: Lowbit, small: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    assert lowbit("convert", small, file, "--to", "gguf:Q8_0").status == 0
    for pair in ((file, small), (small, file)):
        report = lowbit("eval", pair[0], "--text", text, "--reference", pair[1], *MEASURE, "--json").json
        assert 0 < report["reference"]["kl_divergence"] < 0.005


def test_mistakes_are_found_before_a_model_is_loaded(lowbit: Lowbit, small: Path, text: Path, tmp_path: Path) -> None:
    measure = ("eval", small, "--text", text, "--seq-len", 64)
    wide = altered(small, tmp_path / "wide", vocab_size=8448)
    assert "one of 8192 tokens, the reference one of 8448" in lowbit(*measure, "--reference", wide).mistake
    short = altered(small, tmp_path / "short", max_position_embeddings=32)
    assert "longer than the model's 32 positions" in lowbit(*measure, "--reference", short).mistake
    other = altered(small, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    the, of = "Ġthe", "Ġof"
    vocabulary[the], vocabulary[of] = vocabulary[of], vocabulary[the]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "turns the text into other tokens" in lowbit(*measure, "--reference", other).mistake
    assert "there is no folder 'nowhere'" in lowbit(*measure, "--reference", "nowhere").mistake
    assert lowbit("eval", small, "--reference", small).mistake == "give a text to measure on with --text FILE"
    assert "--text FILE, or --tasks NAMES" in lowbit("eval", small).mistake
