"""`lowbit report`: a page about what `lowbit quantize` has made, or one line about why there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowbit.cli import main
from outcome import Lowbit


@pytest.fixture(scope="module")
def quantized(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "small-4bit"
    assert main(["quantize", str(small), str(folder), "--method", "rtn", "--group-size", "64"]) == 0
    return folder


def test_writes_a_page_into_this_folder(
    lowbit: Lowbit, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = lowbit("report", quantized)
    assert outcome.status == 0, outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["small-4bit.html"]
    assert "saved             small-4bit.html" in outcome.out
    assert "28 quantized, 10 kept" in outcome.out
    page = (tmp_path / "small-4bit.html").read_text(encoding="utf-8")
    assert "What it has cost each layer isn" in page
    assert "Weight error" not in page


def test_compares_and_measures(lowbit: Lowbit, quantized: Path, small: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.HTML"
    file.write_text("what was there before", encoding="utf-8")
    measure = ("--text", text, "--seq-len", 64, "--max-windows", 2, "--dtype", "float32", "--device", "cpu")
    outcome = lowbit("report", quantized, "--reference", small, *measure, "--out", file)
    assert outcome.status == 0, outcome.err
    assert [found.name for found in tmp_path.iterdir()] == [file.name]
    evaluated = lowbit("eval", quantized, "--reference", small, *measure, "--json").json
    assert f"perplexity        {evaluated['perplexity']:.4f}" in outcome.out
    assert f"KL divergence     {evaluated['reference']['kl_divergence']:.5f}" in outcome.out
    page = file.read_text(encoding="utf-8")
    assert "text.txt, 2 windows of 64 tokens" in page
    assert "Weight error along the blocks" in page


def test_measures_without_a_reference(lowbit: Lowbit, quantized: Path, text: Path, tmp_path: Path) -> None:
    outcome = lowbit(
        "report", quantized, "--text", text, "--seq-len", 64, "--max-windows", 1, "--out", tmp_path / "a.html"
    )
    assert outcome.status == 0, outcome.err
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "text.txt, 1 window of 64 tokens" in page
    assert "What this checkpoint costs was not measured" in page


def test_takes_a_gguf_file(lowbit: Lowbit, testbed: Path, tmp_path: Path) -> None:
    outcome = lowbit("report", testbed / "gguf" / "small-Q8_0.gguf", "--out", tmp_path / "gguf.html")
    assert outcome.status == 0, outcome.err
    assert "bits per weight   8.500" in outcome.out


def test_refuses_what_it_can_not_write(lowbit: Lowbit, quantized: Path, tmp_path: Path) -> None:
    assert "written as .html, not as 'page.pdf'" in lowbit("report", quantized, "--out", tmp_path / "page.pdf").mistake
    assert "there is no folder" in lowbit("report", quantized, "--out", tmp_path / "no" / "page.html").mistake
    (tmp_path / "folder.html").mkdir()
    assert "is a folder; name a file" in lowbit("report", quantized, "--out", tmp_path / "folder.html").mistake


def test_refuses_before_any_work(lowbit: Lowbit, quantized: Path, small: Path, text: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "page.html")
    assert "the checkpoint is not quantized" in lowbit("report", small, *out).mistake
    assert "is quantized itself (gptq)" in lowbit("report", quantized, "--reference", quantized, *out).mistake
    assert "no folder 'nowhere'" in lowbit("report", "nowhere", *out).mistake
    assert "can't be read" in lowbit("report", quantized, "--text", tmp_path / "no.txt", *out).mistake
    long = lowbit("report", quantized, "--text", text, "--seq-len", 4096, *out).mistake
    assert "4096 tokens are longer than the model's 1024 positions" in long
    assert list(tmp_path.iterdir()) == []


def test_names_the_field_of_a_broken_record(lowbit: Lowbit, quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in quantized.iterdir():
        (folder / file.name).symlink_to(file)
    record = {"version": 1, "layers": [{"name": "model.layers.0.mlp.up_proj", "weight_error": "small"}]}
    (folder / "quantization_report.json").write_text(json.dumps(record), encoding="utf-8")
    mistake = lowbit("report", folder, "--out", tmp_path / "page.html").mistake
    assert "quantization_report.json: layers[0].weight_error has a wrong value" in mistake
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
