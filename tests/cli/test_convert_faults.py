"""A conversion that is cut short: the old checkpoint is there, or the new one, never half of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lowbit as package
from lowbit import AutoModelForCausalLM, GPTQConfig, open_checkpoint
from outcome import Lowbit

SOURCE = str(Path(package.__file__).parent.parent)
# Limits the size of files, or kills the process when it has written so many tensors.
PROGRAM = """
import os, resource, signal, sys
from lowbit.cli import main
from lowbit.wire import shards

kind, number = sys.argv[1], int(sys.argv[2])
if kind == "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
else:
    add, count = shards.ShardWriter.add, 0

    def counted(self, *arguments):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return add(self, *arguments)

    shards.ShardWriter.add = counted
sys.exit(main(sys.argv[3:]))
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and signals are POSIX's")


@pytest.fixture(scope="module")
def packed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "gptq"
    config = GPTQConfig(4, group_size=64)
    AutoModelForCausalLM.from_pretrained(small, quantization_config=config, device_map="cpu").save_pretrained(folder)
    return folder


def convert(kind: str, number: int, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PROGRAM, kind, str(number), "convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


@pytest.mark.parametrize(("target", "form"), [("new", "awq"), ("new.gguf", "gguf:Q4_0")])
def test_a_full_disk_leaves_nothing(packed: Path, tmp_path: Path, target: str, form: str) -> None:
    done = convert("disk", 1_000_000, packed, tmp_path / target, "--to", form)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("lowbit: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_checkpoint(packed: Path, tmp_path: Path, lowbit: Lowbit) -> None:
    assert lowbit("convert", packed, tmp_path / "model", "--to", "awq").status == 0
    before = load_file(tmp_path / "model" / "model.safetensors")
    done = convert("disk", 1_000_000, packed, tmp_path / "model", "--to", "compressed-tensors", "--overwrite")
    assert done.returncode == 2, done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == set(before)


@pytest.mark.parametrize("number", [1, 80])
def test_killed_it_leaves_no_half_of_a_checkpoint(packed: Path, tmp_path: Path, lowbit: Lowbit, number: int) -> None:
    done = convert("kill", number, packed, tmp_path / "model", "--to", "awq")
    assert done.returncode == -9
    assert not (tmp_path / "model").exists()
    assert lowbit("convert", packed, tmp_path / "model", "--to", "awq").status == 0
    assert len(open_checkpoint(tmp_path / "model").weights) == 28
