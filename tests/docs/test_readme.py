"""Every example of the README, run as it stands and in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from snippets import blocks, run_python, run_shell

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_examples_run_in_order_and_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks(README)
    assert {block.language for block in examples} == {"python", "bash"}
    assert len(examples) >= 15
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in examples:
        if block.language == "python":
            run_python(README, block, namespace)
        else:
            run_shell(README, block, tmp_path)
