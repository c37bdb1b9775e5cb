"""Every example of the README, run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from snippets import blocks, run_python, run_shell

README = Path(__file__).resolve().parents[2] / "README.md"


def test_python_examples_run_in_order_and_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = [block for block in blocks(README) if block.language == "python"]
    assert len(examples) >= 10
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in examples:
        run_python(README, block, namespace)


def test_shell_examples_run(tmp_path: Path) -> None:
    examples = [block for block in blocks(README) if block.language in ("bash", "console")]
    assert any("lowbit quantize" in block.text for block in examples)
    for block in examples:
        run_shell(README, block, tmp_path)


def test_every_example_is_of_a_kind_that_is_run() -> None:
    assert {block.language for block in blocks(README)} == {"python", "bash"}
