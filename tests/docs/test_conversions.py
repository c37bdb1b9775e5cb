"""The table of conversions: on the page as in the code, and true of weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lowbit.algorithms import find_algorithm, quantize
from lowbit.core import QuantSpec
from lowbit.core.respell import conditions, respell, why_not
from lowbit.errors import PlanError
from lowbit.wire import wire_named
from lowbit.wire.conversions import ask, sources

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "make_conversions.py"
SOURCES = {title: (name, spec) for title, name, spec in sources()}
COLUMNS = ("gptq", "awq", "hqq", "quanto", "torchao", "compressed-tensors", "eetq", "fbgemm_fp8", "gguf")


def can_be_made(spec: QuantSpec) -> bool:
    """Whether there is a quantizer: not for codebooks such as those of AQLM."""
    try:
        find_algorithm(spec)
    except PlanError:
        return False
    return True


def test_the_page_shows_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("make_conversions", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.PAGE.read_text(encoding="utf-8")
    assert text == tool.page(text), f"run {TOOL.relative_to(REPOSITORY)}"
    assert text.count("| yes |") > 20


@pytest.mark.parametrize("title", [title for title, (_, spec) in SOURCES.items() if can_be_made(spec)])
def test_what_the_table_promises_holds(title: str) -> None:
    """A random weight goes through the bytes of every format that holds it always, and keeps its bits."""
    _, spec = SOURCES[title]
    before = quantize(torch.randn(64, 256) * 0.05, spec)
    for name in COLUMNS:
        wire, answer = wire_named(name), ask(spec, wire_named(name))
        if answer.reason or answer.conditions or answer.spec is None:
            continue
        after = respell(before, answer.spec)
        settings = wire.settings_for(answer.spec)
        if wire.refusal(settings, answer.spec, before.shape):
            continue
        written = wire.write(settings, after)
        if wire.needs_shapes:
            settings = wire.of(wire.with_shapes(settings, {"x": before.shape}), "x")
        read = wire.read(settings, written)
        for dtype in {torch.float32, spec.dtype}:
            assert torch.equal(read.dequantize(dtype), before.dequantize(dtype)), name
        if why_not(read.spec, spec) is None and not conditions(read.spec, spec):
            assert respell(read, spec).equal(before), name
