"""The folder of a job: what is filed is whole or not there, and nobody else's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.calibration import job as jobs
from lowbit.calibration.job import BlockResult, Job
from lowbit.errors import PlanError

IDENTITY: dict[str, Any] = {"model": {"weights": "ab"}, "method": {"tune": None, "algorithms": [{"damp": 0.1}]}}


def result(seed: int) -> BlockResult:
    generator = torch.Generator().manual_seed(seed)
    spec = integer_spec(bits=4, group_size=32)
    unit = RoundToNearest().quantize(torch.randn(16, 64, generator=generator), spec)
    norm = torch.randn(64, generator=generator).to(torch.bfloat16)
    return BlockResult({"layers.0.q": unit}, {"layers.0.norm.weight": norm}, {"name": "layers.0", "error": 1 / 3})


def assert_equal(found: BlockResult | None, expected: BlockResult) -> None:
    assert found is not None
    assert found.report == expected.report
    assert found.units.keys() == expected.units.keys()
    assert found.dense.keys() == expected.dense.keys()
    for name, unit in expected.units.items():
        assert (found.units[name].spec, found.units[name].shape) == (unit.spec, unit.shape)
        assert all(torch.equal(found.units[name].tensors[part], value) for part, value in unit.tensors.items())
    assert all(torch.equal(found.dense[name], value) for name, value in expected.dense.items())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job", IDENTITY)


def test_a_block_comes_back_as_it_was_filed(job: Job) -> None:
    job.save(0, result(0))
    job.close()
    again = Job(job.folder, IDENTITY)
    assert_equal(again.load(0), result(0))
    assert again.report(0) == result(0).report


def test_a_block_without_units_comes_back(job: Job) -> None:
    job.save(3, BlockResult({}, {}, {"name": "empty"}))
    assert_equal(job.load(3), BlockResult({}, {}, {"name": "empty"}))


def test_tensors_with_shared_memory_are_filed(job: Job) -> None:
    """Parts of one buffer, as they come off a device."""
    spec = integer_spec(bits=4, group_size=32)
    made = RoundToNearest().quantize(torch.randn(16, 64), spec)
    shared = BlockResult({"a": made, "b": made}, {}, {})
    job.save(0, shared)
    assert_equal(job.load(0), shared)


def test_only_blocks_without_a_gap_are_finished(job: Job) -> None:
    for number in (0, 1, 3):
        job.save(number, result(number))
    assert job.finished(4) == 2
    assert job.finished(2) == 2
    assert job.finished(4, "learned") == 0


def test_sections_are_apart(job: Job) -> None:
    job.save(0, result(0))
    job.save(0, result(1), "learned")
    assert_equal(job.load(0), result(0))
    assert_equal(job.load(0, "learned"), result(1))


def every_bit_flipped(path: Path) -> list[bytes]:
    """The file with one bit changed, at every 13th byte and at the last."""
    data = path.read_bytes()
    places = [*range(0, len(data), 13), len(data) - 1]
    return [data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :] for place in places]


def every_beginning(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[:end] for end in range(0, len(data), 17)]


@pytest.mark.parametrize("damage", [every_bit_flipped, every_beginning])
@pytest.mark.parametrize("name", ["00001.json", "00001.safetensors"])
def test_a_damaged_block_is_not_there(name: str, damage: Callable[[Path], list[bytes]], job: Job) -> None:
    for number in range(2):
        job.save(number, result(number))
    path = job.folder / "blocks" / name
    for data in damage(path):
        path.write_bytes(data)
        assert job.load(1) is None
        assert job.finished(2) == 1
    assert_equal(job.load(0), result(0))
    job.save(1, result(1))
    assert job.finished(2) == 2


@pytest.mark.parametrize("damage", [every_bit_flipped, every_beginning])
@pytest.mark.parametrize("name", ["learning.sum", "learning.safetensors"])
def test_a_damaged_state_is_not_there(name: str, damage: Callable[[Path], list[bytes]], job: Job) -> None:
    state = {"value": torch.arange(100.0), "step": torch.tensor(7.0)}
    job.save_state("learning", state, {"step": 7})
    found = job.load_state("learning")
    assert found is not None
    assert found[1] == {"step": 7}
    assert all(torch.equal(found[0][key], value) for key, value in state.items())
    for data in damage(job.folder / name):
        (job.folder / name).write_bytes(data)
        assert job.load_state("learning") is None


def test_a_state_takes_the_place_of_the_one_before(job: Job) -> None:
    assert job.load_state("learning") is None
    job.save_state("learning", {"a": torch.zeros(2)}, {"step": 1})
    kept = job.load_state("learning")
    job.save_state("learning", {"a": torch.ones(2)}, {"step": 2})
    new = job.load_state("learning")
    assert kept is not None
    assert new is not None
    assert kept[0]["a"].tolist() == [0, 0]  # mapped from the file that was replaced
    assert (new[0]["a"].tolist(), new[1]) == ([1, 1], {"step": 2})


@pytest.mark.parametrize("failing", ["save_file", "_write", "_settle"])
def test_a_full_disk_leaves_the_block_before(failing: str, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.save(0, result(0))
    with monkeypatch.context() as patched:

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched.setattr(jobs, failing, full)
        with pytest.raises(OSError, match="No space left"):
            job.save(1, result(1))
    assert job.finished(2) == 1
    job.save(1, result(1))
    assert job.finished(2) == 2


def test_the_reason_why_a_file_cannot_be_written(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise jobs.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(jobs, "save_file", refused)
    with pytest.raises(OSError, match=r"00000\.safetensors can't be written: .*No space left"):
        job.save(0, result(0))
    with pytest.raises(OSError, match=r"learning\.safetensors can't be written: .*No space left"):
        job.save_state("learning", {}, {})


def test_a_decision_is_made_once(job: Job) -> None:
    assert job.decide("epochs", lambda: 3) == 3
    assert job.decide("epochs", lambda: 5) == 3
    (job.folder / "epochs.json").write_text("{")
    assert job.decide("epochs", lambda: 5) == 5


# ---------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({**IDENTITY, "model": {"weights": "cd"}}, "model.weights"),
        ({**IDENTITY, "model": {}}, "model.weights"),
        ({**IDENTITY, "more": 1}, "more"),
        ({**IDENTITY, "method": {**IDENTITY["method"], "tune": {"steps": 1}}}, "method.tune"),
        ({**IDENTITY, "method": {**IDENTITY["method"], "algorithms": [{"damp": 0.2}]}}, "method.algorithms.0.damp"),
        ({**IDENTITY, "method": {**IDENTITY["method"], "algorithms": []}}, "method.algorithms"),
        ({}, "method, model"),
    ],
)
def test_another_job_is_refused(changed: dict[str, Any], named: str, job: Job) -> None:
    job.close()
    with pytest.raises(PlanError) as refused:
        Job(job.folder, changed)
    assert f"holds a job that differs in {named};" in str(refused.value)
    Job(job.folder, IDENTITY).close()  # and nothing was changed


def test_another_version_of_the_folder_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.close()
    monkeypatch.setattr(jobs, "_VERSION", 2)
    with pytest.raises(PlanError, match="differs in version"):
        Job(job.folder, IDENTITY)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_damaged_manifest_is_refused(data: bytes, job: Job) -> None:
    job.close()
    (job.folder / "manifest.json").write_bytes(data)
    with pytest.raises(PlanError, match="remove the folder to start anew"):
        Job(job.folder, IDENTITY)
    assert (job.folder / "manifest.json").read_bytes() == data


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PlanError, match=r"no job's folder: it has no manifest\.json, but \['model\.safetensors'\]"):
        Job(tmp_path, IDENTITY)


def test_a_job_that_was_ended_before_it_was_named_can_begin(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"")
    (tmp_path / ".manifest.json.partial").write_bytes(b"{")
    Job(tmp_path, IDENTITY).save(0, result(0))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        Job(tmp_path / "file", IDENTITY)


# -------------------------------------------------------------------------------------------------------------- lock


def test_one_at_a_time(job: Job) -> None:
    with pytest.raises(PlanError, match="another process works on the job"):
        Job(job.folder, IDENTITY)
    job.close()
    with Job(job.folder, IDENTITY), pytest.raises(PlanError, match="another process"):
        Job(job.folder, IDENTITY)
    Job(job.folder, IDENTITY).close()


def test_a_refused_job_lets_go_of_the_lock(job: Job) -> None:
    job.close()
    with pytest.raises(PlanError, match="differs"):
        Job(job.folder, {})
    Job(job.folder, IDENTITY).close()


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import os, signal, sys",
            "from pathlib import Path",
            "from lowbit.calibration.job import Job",
            f"job = Job(Path({str(tmp_path / 'job')!r}), {IDENTITY!r})",
            "print('locked', flush=True)",
            "sys.stdin.read()",
        ]
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if other.stdout is None:
        raise RuntimeError("the process has no output")
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(PlanError, match="another process works on the job"):
        Job(tmp_path / "job", IDENTITY)
    other.kill()
    other.communicate()
    Job(tmp_path / "job", IDENTITY).close()


def test_those_that_only_help_need_no_lock(job: Job) -> None:
    """Of several processes one files; the others read."""
    job.save(0, result(0))
    helper = Job(job.folder, IDENTITY, writes=False)
    assert_equal(helper.load(0), result(0))
    helper.save(1, result(1))
    helper.save_state("learning", {"a": torch.zeros(1)}, {})
    assert job.load(1) is None
    assert job.load_state("learning") is None
