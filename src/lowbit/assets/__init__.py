"""What comes with the package: a small language model, and a text to measure it on."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def small_model() -> Path:
    """The folder of the embedded language model, 5.25M parameters; its README.md is the model card."""
    return _HERE / "small"


def sample_text() -> Path:
    """A UTF-8 text of 6144 tokens, sampled from the embedded model at temperature 1 in full precision."""
    return _HERE / "sample.txt"
