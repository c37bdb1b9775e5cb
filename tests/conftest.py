"""What several tests share: the real models, and where they are missing, the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small() -> Path:
    """The embedded language model."""
    return Path(lowbit.__file__).parent / "assets" / "small"


@pytest.fixture(params=["lowbit", "registered"])
def auto(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`AutoModelForCausalLM`, of lowbit, or Transformers' own after `lowbit.register()`."""
    if request.param == "lowbit":
        yield lowbit.AutoModelForCausalLM
        return
    lowbit.register()
    yield transformers.AutoModelForCausalLM
    lowbit.unregister()


@pytest.fixture(scope="session")
def testbed() -> Path:
    """The larger real model and its texts, which are not part of the repository."""
    folder = SHARED / "testbed"
    if not folder.is_dir():
        pytest.skip(f"the testbed is not at {folder.name}/ beside the repository")
    return folder
