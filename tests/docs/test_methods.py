"""The table of methods is what the code says, and every cell has a test behind it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lowbit.integrations.recommend import CANDIDATES
from lowbit.integrations.transformers.capabilities import EVIDENCE, UNTESTED, capabilities, markdown, spans
from lowbit.integrations.transformers.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "methods.md"


def test_the_page_holds_the_table_that_the_code_makes() -> None:
    assert markdown() in PAGE.read_text(encoding="utf-8"), "print it with 'lowbit methods --markdown'"


def test_the_page_names_the_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(test in text for test in EVIDENCE.values())


@pytest.mark.parametrize("column", EVIDENCE)
def test_the_named_tests_exist_and_go_through_all_formats(column: str) -> None:
    file, _, name = EVIDENCE[column].partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    assert "pytest.mark.parametrize('name', formats.FORMATS)" in decorators


def test_the_formats_that_those_tests_go_through_are_all_methods() -> None:
    names = _formats().FORMATS
    for method in METHODS:
        assert any(name.startswith(method) for name in names), method


def _formats() -> Any:
    path = ROOT / "tests" / "integrations" / "formats.py"
    spec = importlib.util.spec_from_file_location("formats_of_methods", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_the_table_has_to_say() -> None:
    found = {entry.method: entry for entry in capabilities()}
    assert set(found) == set(METHODS)
    assert all(entry.on_the_fly for entry in found.values())
    assert all(entry.serializable == "yes" for entry in found.values())
    assert {entry.rocm for entry in found.values()} == {UNTESTED}
    assert found["gptq"].bits == (2, 3, 4, 8)
    assert found["awq"].bits == (4,)
    assert found["bitsandbytes"].bits == (4, 8)
    assert set(range(1, 9)) <= set(found["gguf"].bits) | {7}
    assert 4 in found["gptq"].convertible["awq"]
    assert found["fbgemm_fp8"].convertible == {} or 8 in next(iter(found["fbgemm_fp8"].convertible.values()))


def test_the_numbers_that_recommendations_go_by_are_on_their_page() -> None:
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    for candidate in CANDIDATES:
        assert not candidate.method or f"| {candidate.title} | {candidate.perplexity:g} % |" in page


def test_spans() -> None:
    assert spans((2, 3, 4, 8)) == "2-4, 8"
    assert spans((1,)) == "1"
    assert spans(()) == ""
