"""The Python examples of the pages under docs/, and the links between pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowbit.algorithms import base
from lowbit.kernels import registry
from lowbit.wire import detect
from snippets import blocks, run_python

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
# The method of one's own has tests of its own.
EXAMPLES = [page for page in PAGES if page.name != "twelfth-method.md" and "```python\n" in page.read_text("utf-8")]
_LINK = re.compile(r"\]\(([^)#\s]+)\)")


@pytest.fixture
def _registries_as_before() -> Iterator[None]:
    lists = [base._registered(), registry._registered(), detect._registered()]
    before = [list(entries) for entries in lists]
    yield
    for entries, kept in zip(lists, before, strict=True):
        entries[:] = kept


# PEFT calls by names that Transformers has changed.
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: str(page.relative_to(REPOSITORY)))
@pytest.mark.usefixtures("_registries_as_before")
def test_examples_run_in_order_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            run_python(page, block, namespace)


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *PAGES], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_lists_every_page() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(REPOSITORY / "docs" / link).resolve() for link in _LINK.findall(index)}
    # Kernels have a folder for their pages, which the index names as a whole.
    assert {page for page in PAGES if page.name != "README.md" and page.parent.name != "kernels"} <= linked
