"""`lowbit recommend`: what is said to be needed is needed, and the best that fits is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit as library
from lowbit.cli.recommend import parse_size
from lowbit.cli.request import Format, Method, Request
from lowbit.errors import PlanError
from lowbit.integrations.recommend import CANDIDATES, cache_bytes, recommend
from lowbit.integrations.transformers.methods import METHODS
from outcome import Lowbit

GIB = 2**30
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A folder with nothing but the configuration of a model of 7 billion parameters."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return tmp_path


def test_the_best_that_fits_is_recommended(lowbit: Lowbit, mistral: Path) -> None:
    choices = {}
    for memory in ("20GiB", "9.5GiB", "5.7GiB", "4.4GiB"):
        report = lowbit("recommend", mistral, "--memory", memory, "--device", "cuda", "--json").json
        choices[memory] = report["choice"]
        assert report["choice"]["total_bytes"] <= report["memory_bytes"]
        assert all(option["total_bytes"] > report["memory_bytes"] for option in report["too_large"])
        costs = [option["perplexity_increase_percent"] for option in [report["choice"], *report["alternatives"]]]
        assert costs == sorted(costs)
    assert choices["20GiB"]["method"] is None
    assert 8 <= choices["9.5GiB"]["bits_per_weight"] <= 8.5
    assert choices["5.7GiB"]["bits_per_weight"] < 5
    assert choices["4.4GiB"]["bits_per_weight"] < 4


def test_what_is_said_on_a_screen(lowbit: Lowbit, mistral: Path) -> None:
    out = lowbit("recommend", mistral, "--memory", "8GiB", "--device", "cpu").out
    assert "recommended       GGUF Q6_K, 6.562 bits per weight" in out
    assert "why               it needs" in out
    assert f"lowbit convert {mistral} OUT.gguf --to gguf:Q6_K" in out
    assert "lowbit.GgufConfig(type='Q6_K')" in out
    assert "NF4" in out
    assert "too large" in out


def test_an_error_says_how_much_would_be_needed(lowbit: Lowbit, mistral: Path) -> None:
    mistake = lowbit("recommend", mistral, "--memory", "1GiB").mistake
    assert "nothing fits into 1.00 GiB" in mistake
    assert "weights" in mistake and "cache" in mistake


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8G", 8 * GIB),
        ("8GB", 8 * 10**9),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("4096", 4096),
        ("512m", 2**29),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GiB", "0", "8XB", "1e9", "9" * 50])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(PlanError):
        parse_size(text)


def test_a_quantized_model_is_refused(lowbit: Lowbit, mistral: Path) -> None:
    config = MISTRAL | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (mistral / "config.json").write_text(json.dumps(config))
    assert "is quantized already (gptq)" in lowbit("recommend", mistral, "--memory", "8GiB").mistake


def test_a_model_that_transformers_does_not_know(lowbit: Lowbit, mistral: Path) -> None:
    (mistral / "config.json").write_text('{"model_type": "martian"}')
    assert "can't read the configuration" in lowbit("recommend", mistral, "--memory", "8GiB").mistake


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.title)
def test_the_bytes_of_weights_are_those_of_the_loaded_model(candidate: Any, small: Path) -> None:
    if candidate.method and candidate.method not in METHODS:
        pytest.skip(f"no method {candidate.method}")
    config = transformers.AutoConfig.from_pretrained(small)
    found = recommend(config, device="cpu", memory=GIB, context=64)
    option = next(option for option in found.fitting if option.candidate is candidate)
    quantization = METHODS[candidate.method].config_class(**candidate.arguments) if candidate.method else None
    model = library.AutoModelForCausalLM.from_pretrained(small, quantization_config=quantization, dtype=config.dtype)
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    assert option.need.weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if c.options], ids=lambda candidate: candidate.title)
def test_the_command_asks_for_what_was_counted(candidate: Any) -> None:
    words = candidate.options.split()
    options = {"double_quant": "--double-quant" in words}
    given = (
        dict(zip(words[::2], words[1::2], strict=False)) if words[-1] != "--double-quant" else {"--method": words[1]}
    )
    if candidate.method not in METHODS:
        pytest.skip(f"no method {candidate.method}")
    config = Request(
        Method(given["--method"]),
        *(int(given[name]) if name in given else None for name in ("--bits", "--group-size")),
        format=Format(given["--format"]) if "--format" in given else None,
        **options,
    ).config()
    wanted = METHODS[candidate.method].config_class(**candidate.arguments)
    assert config.to_dict() == wanted.to_dict()


def test_candidates_are_in_the_order_of_what_they_cost() -> None:
    costs = [candidate.perplexity for candidate in CANDIDATES]
    assert costs == sorted(costs)


def test_the_cache_is_what_transformers_allocates() -> None:
    config = transformers.MistralConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, sliding_window=None
    )

    assert cache_bytes(config, 100, torch.bfloat16) == 3 * 2 * 2 * 16 * 100 * 2
    sliding = transformers.Gemma3TextConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=10,
    )
    full = sliding.layer_types.count("full_attention")
    assert cache_bytes(sliding, 100, torch.float32) == 2 * 16 * 4 * (full * 100 + (6 - full) * 10)
