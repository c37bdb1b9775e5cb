"""What may befall a calibrated run: kills, full disks, damaged files, bad data. It ends right or says what is wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_jobs


class Processes:
    """Runs in processes of their own, made by one that has imported everything."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("job_process.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def run(self, source: Path, job: Path, out: Path, **request: Any) -> dict[str, Any]:
        """See ``job_process.work``."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        folders = {"source": str(source), "job": str(job), "out": str(out)}
        self._process.stdin.write(json.dumps({**folders, **request}) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    opened = Processes()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_jobs.save_llama(tmp_path_factory.mktemp("llama"))


# ------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("place", "learn", "kills"),
    [("anywhere", False, 8), ("filing", False, 6), ("learning", True, 4), ("writing", False, 4)],
)
def test_killed_again_and_again(
    place: str, learn: bool, kills: int, llama: Path, processes: Processes, tmp_path: Path
) -> None:
    """However often it is killed, the run that gets to the end gives the bits of one that never was."""
    whole = processes.run(llama, tmp_path / "whole", tmp_path / "whole-out", learn=learn, place=place, kill=None)
    assert whole["status"] == 0
    expected = tiny_jobs.contents(tmp_path / "whole-out")
    draw, chain, done = random.Random(f"{place} {learn}"), 0, 0
    while done < kills:
        chain += 1
        job, ended = tmp_path / f"job{chain}", False
        for number in range(100):
            at = draw.randint(1, whole["count"])
            out = tmp_path / f"out{chain}-{number}"
            answer = processes.run(llama, job, out, learn=learn, place=place, kill=at if done < kills else None)
            ended = answer["status"] == 0
            assert ended or answer["status"] == -signal.SIGKILL, answer
            if ended:
                assert "error" not in answer
                assert tiny_jobs.contents(out) == expected
                break
            done += 1
        assert ended
