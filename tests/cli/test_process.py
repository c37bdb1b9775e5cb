"""The command line as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lowbit

SOURCE = str(Path(lowbit.__file__).parent.parent)


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=_environment(), check=False, timeout=120
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")])}


def test_status_and_streams(small: Path) -> None:
    good = _run("-m", "lowbit", "inspect", small, "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["format"] == "dense"
    assert good.stderr == ""
    bad = _run("-m", "lowbit", "inspect", small / "config.json")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == f"lowbit: '{small / 'config.json'}' is a file; give the folder of a checkpoint\n"


def test_importing_the_command_line_is_light() -> None:
    program = (
        "import sys, lowbit, lowbit.cli; print(*sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert _run("-c", program).stdout == "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_nothing_behind(small: Path, tmp_path: Path, number: int, status: int) -> None:
    # Reports when the new folder is being filled, and takes its time from there.
    program = f"""
import signal, sys, time, lowbit.cli.quantize as quantize
from lowbit.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored where the tests run in the background
def slow(model, source, folder):
    (folder / "model.safetensors").touch()
    print("saving", flush=True)
    time.sleep(60)
quantize.save = slow
sys.exit(main(["quantize", {str(small)!r}, {str(tmp_path / "model")!r}, "--method", "rtn"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=_environment())
    assert process.stdout is not None
    with process.stdout:
        while "saving" not in (line := process.stdout.readline()):
            assert line, "the process ended early"
        started = time.monotonic()
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(timeout=60) == status
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []
