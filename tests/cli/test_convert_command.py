"""``lowbit convert`` on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit import open_checkpoint
from lowbit.cli.convert import parse_size
from lowbit.errors import PlanError
from outcome import Lowbit


@pytest.fixture
def gptq(lowbit: Lowbit, small: Path, tmp_path: Path) -> Path:
    assert lowbit("quantize", small, tmp_path / "gptq", "--method", "rtn").status == 0
    return tmp_path / "gptq"


def test_gptq_through_three_formats_and_back_gives_the_same_file(lowbit: Lowbit, gptq: Path, tmp_path: Path) -> None:
    source = gptq
    for number, to in enumerate(("awq", "compressed-tensors", "hqq", "gptq")):
        outcome = lowbit("convert", source, tmp_path / f"{number}", "--to", to)
        assert outcome.status == 0, outcome.err
        assert "28 of 28 to the bit" in outcome.out
        source = tmp_path / f"{number}"
    assert (source / "model.safetensors").read_bytes() == (gptq / "model.safetensors").read_bytes()
    assert (source / "tokenizer.json").read_bytes() == (gptq / "tokenizer.json").read_bytes()


def test_refused_rounded_anew_and_dequantized(lowbit: Lowbit, gptq: Path, small: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    refused = lowbit("convert", gptq, target, "--to", "nf4")
    assert "model.layers.0.mlp.down_proj can't be spelled in 'bitsandbytes-4bit'" in refused.mistake
    assert "--requantize" in refused.mistake
    assert not target.exists() and not list(tmp_path.glob(".target*"))

    anew = lowbit("convert", gptq, target, "--to", "nf4", "--requantize")
    assert "rounded anew      28: changed by 10." in anew.out
    assert lowbit("inspect", target, "--json").json["format"] == "bitsandbytes-4bit"
    assert "is not empty" in lowbit("convert", gptq, target, "--to", "dense").mistake

    dense = lowbit("convert", gptq, target, "--to", "dense", "--dtype", "float32", "--shard-size", "4MB", "--overwrite")
    assert "28 dequantized" in dense.out
    assert lowbit("inspect", target, "--json").json["bits_per_weight"] == 32
    assert len(list(target.glob("model-*.safetensors"))) > 4
    assert "is dense; 'lowbit quantize'" in lowbit("convert", small, tmp_path / "x", "--to", "gptq").mistake


def test_gguf_files(lowbit: Lowbit, small: Path, tmp_path: Path) -> None:
    file, again, packed = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "packed"
    assert lowbit("convert", small, file, "--to", "gguf:Q8_0").status == 0
    assert "29 of 29 to the bit" in lowbit("convert", file, packed, "--to", "gptq").out
    report = lowbit("inspect", packed, "--json").json
    assert (report["format"], len(report["weights"])) == ("gptq", 28)
    assert (packed / "tokenizer.json").is_file()
    assert lowbit("convert", packed, again, "--to", "gguf:Q8_0").status == 0
    before, after = open_checkpoint(file).weights, open_checkpoint(again).weights
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert tensor.equal(after[name]), name


def test_gguf_files_of_quantized_models(lowbit: Lowbit, gptq: Path, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    assert "can't hold these numbers to the bit" in lowbit("convert", gptq, file, "--to", "gguf:Q4_0").mistake
    assert not file.exists()
    outcome = lowbit("convert", gptq, file, "--to", "gguf:Q4_0", "--requantize")
    assert "rounded anew      28: changed by 6." in outcome.out
    assert "exists; --overwrite" in lowbit("convert", gptq, file, "--to", "gguf:Q4_0").mistake
    assert "ends in .gguf" in lowbit("convert", gptq, tmp_path / "x", "--to", "gguf").mistake
    assert "gguf:F16" in lowbit("convert", gptq, file, "--to", "gguf:Q4_0", "--dtype", "float16").mistake
    symmetric = tmp_path / "symmetric"
    assert lowbit("quantize", small, symmetric, "--method", "rtn", "--symmetric", "--group-size", 32).status == 0
    assert lowbit("convert", symmetric, tmp_path / "c.gguf", "--to", "gguf").status == 0
    four = open_checkpoint(tmp_path / "c.gguf")
    assert {four.wire.of(four.settings, name).type.name for name in four.weights} == {"Q4_0"}
    for name, tensor in open_checkpoint(symmetric).weights.items():
        assert torch.equal(tensor.dequantize(), four.weights[name].dequantize())
    parts = lowbit("convert", gptq, tmp_path / "b.gguf", "--to", "gguf", "--shard-size", "3MB")
    assert parts.status == 0 and len(list(tmp_path.glob("b-*-of-*.gguf"))) == 3


def test_sizes() -> None:
    assert parse_size("2GB") == 2 * 10**9
    assert parse_size("1.5MiB") == 3 * 2**19
    for wrong in ("2", "GB", "-1GB", "0MB", "1e400GB", "nanGB", "2TB"):
        with pytest.raises(PlanError, match="a size is a number"):
            parse_size(wrong)
