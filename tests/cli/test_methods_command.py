"""`lowbit methods`: on a screen, as JSON and as the table of the page."""

from __future__ import annotations

from lowbit.integrations.transformers.capabilities import EVIDENCE, markdown
from outcome import Lowbit


def test_methods_on_a_screen(lowbit: Lowbit) -> None:
    out = lowbit("methods").out
    assert "torch.compile" in out
    assert "not tested on hardware" in " ".join(out.split())


def test_methods_as_json(lowbit: Lowbit) -> None:
    report = lowbit("methods", "--json").json
    gptq = next(entry for entry in report["methods"] if entry["method"] == "gptq")
    assert gptq["bits"] == [2, 3, 4, 8]
    assert 4 in gptq["convertible"]["awq"]
    assert report["evidence"] == EVIDENCE


def test_methods_as_the_page_has_them(lowbit: Lowbit) -> None:
    assert lowbit("methods", "--markdown").out.strip() == markdown()
