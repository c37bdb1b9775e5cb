"""Running the original libraries in processes of their own.

Some of them change Transformers as soon as they can be imported, and all of them would hide it if lowbit needed them.
So they are installed into a folder apart (``scripts/install``), which only these processes have on their path. A task
is a script beside this file, ``original_<library>.py``, that takes a folder and further arguments as words, does its
work with the original library, and leaves files in the folder: safetensors, JSON, checkpoints.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("LOWBIT_PEERS", str(Path(sys.prefix) / "peers")))


@functools.cache
def has(package: str) -> bool:
    """Whether the original library is installed, apart or not."""
    return (PEERS / package).is_dir() or importlib.util.find_spec(package) is not None


def require(*packages: str) -> None:
    """Skip the test (or the module that is being imported) where an original library is missing."""
    missing = [package for package in packages if not has(package)]
    if missing:
        pytest.skip(f"the original library is not installed: {', '.join(missing)}", allow_module_level=True)


def run(script: str, *words: str | Path, timeout: int = 600) -> str:
    """Run ``tests/golden/<script>`` with the original libraries on its path; returns what it printed.

    Raises:
        AssertionError: it failed; holds the end of its output.
    """
    environment = os.environ | {"PYTHONPATH": str(PEERS), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{script} {' '.join(map(str, words))} failed:\n{done.stderr[-4000:]}")
    return done.stdout
