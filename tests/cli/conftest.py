"""Running the command line inside the test's process, and leaving nothing of it behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from lowbit.cli import main
from outcome import Lowbit, Outcome


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads gain nothing on so small a model, and lose much where something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lowbit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lowbit]:
    """``lowbit("eval", path, "--text", file)``: runs a command line."""
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    handler, level = signal.getsignal(signal.SIGTERM), logging.get_verbosity()

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Outcome(status, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The first thousand characters or so of the embedded text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((small.parent / "sample.txt").read_text(encoding="utf-8")[:1200], encoding="utf-8")
    return file
