"""The demo, on a little of its text."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from rich.console import Console
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from lowbit.bench.demo import METHODS, MODEL, Row, demo_windows, run_demo
from lowbit.bench.plot import check_plot_file, draw
from lowbit.cli.demo import _print as show_table
from lowbit.errors import PlanError
from outcome import Lowbit

ROWS = (
    Row("dense, bf16", 16.0, 10.5, 40.4, 0.0, 100, "a town"),
    Row("gptq 8 bits", 8.19, 7.5, 40.39, -0.01, 30, "a town"),
    Row("gptq 4 bits", 4.16, 5.9, 44.1, 3.7, 30, "a village"),
    Row("awq 4 bits", 4.16, 5.8, 44.1, 3.7, 30, "a village"),
    Row("bitsandbytes nf4", 4.5, 6.0, 43.1, 2.7, 30, "a city"),
    Row("gptq 2 bits", 2.15, 5.1, 657.3, 616.9, 30, "[b]of the theatements"),
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.bench.demo.NEW_TOKENS", 3)


def test_all_methods(lowbit: Lowbit) -> None:
    before = dict(AUTO_QUANTIZER_MAPPING)
    report = lowbit("demo", "--max-windows", 1, "--json").json
    assert before == AUTO_QUANTIZER_MAPPING
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == [method.name for method in METHODS]
    assert report["tokens"] == 255
    dense = rows["dense, bf16"]
    assert dense["change"] == 0
    for row in rows.values():
        assert row["change"] == row["perplexity"] - dense["perplexity"]
        assert row["tokens_per_second"] > 0
        assert row["text"]
        assert row["size_mb"] <= dense["size_mb"]
    bits = {name: row["bits_per_weight"] for name, row in rows.items()}
    assert bits["dense, bf16"] == 16
    assert bits["bitsandbytes nf4, nested"] < bits["bitsandbytes nf4"] == bits["bitsandbytes fp4"] < 4.6
    assert bits["awq 4 bits"] == bits["gptq 4 bits"] < 4.2
    assert rows["awq 4 bits"]["perplexity"] == rows["gptq 4 bits"]["perplexity"]
    changes = [rows[f"gptq {number} bits"]["change"] for number in (8, 4, 3, 2)]
    assert changes == sorted(changes)


def test_table_and_plot(lowbit: Lowbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("lowbit.bench.demo.METHODS", METHODS[:2])
    plot = tmp_path / "plot.svg"
    outcome = lowbit("demo", "--max-windows", 1, "--plot", plot)
    assert outcome.status == 0, outcome.err
    assert "bitsandbytes int8" in outcome.out
    assert "255 tokens sampled from the model itself" in outcome.out
    assert "plot saved to" in outcome.err
    assert "bitsandbytes int8" in plot.read_text()


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_table_fits_the_screen(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowbit.cli.console.stdout", lambda: Console(width=columns, highlight=False))
    show_table([*ROWS, replace(ROWS[-1], text="very " * 40)], 255)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in "".join(line for line in lines if "very very" not in line)
    for row in ROWS:
        assert any(row.method in line and f"{row.perplexity:.2f}" in line for line in lines)
        assert any(row.method in line and row.text in line for line in lines)


def test_what_is_registered_stays_registered() -> None:
    from lowbit import register, unregister
    from lowbit.integrations.transformers.quantizer import LowbitQuantizer

    windows = demo_windows(transformers.AutoTokenizer.from_pretrained(MODEL), 1)[:, :8]
    register()
    try:
        list(run_demo(windows, transformers.AutoTokenizer.from_pretrained(MODEL), METHODS[:1]))
        assert AUTO_QUANTIZER_MAPPING["gptq"] is LowbitQuantizer
    finally:
        unregister()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_formats(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot{suffix}"
    draw(ROWS, file)
    assert file.stat().st_size > 5000
    if suffix == ".svg":
        drawn = file.read_text()
        assert "gptq 4 bits, awq 4 bits" in drawn  # one label for points that can't be told apart
        assert "dense, bf16" in drawn


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"plotting needs matplotlib: pip install 'lowbit\[plot\]'"):
        check_plot_file(tmp_path / "plot.png")
