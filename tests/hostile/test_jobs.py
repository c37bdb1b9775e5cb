"""What may befall a calibrated run: kills, full disks, damaged files, bad data. It ends right or says what is wrong."""

from __future__ import annotations

import collections
import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tiny_jobs
from lowbit.algorithms import RoundToNearest
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.statistics import Collector
from lowbit.calibration import job as jobs
from lowbit.calibration import runner
from lowbit.calibration.job import Job
from lowbit.errors import PlanError
from lowbit.integrations.transformers import calibrate


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


# -------------------------------------------------------------------------------------------------- what stops a run


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run gives that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return tiny_jobs.finish(tiny_jobs.open_run(llama, folder / "job"), folder / "out")


def nth(number: int, error: BaseException, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, but for its `number`-th time, which raises."""
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise error
        return call(*args, **kwargs)

    return counted


def test_a_full_disk_while_a_block_is_filed(
    llama: Path, processes: Processes, tmp_path: Path, expected: dict[str, Any]
) -> None:
    """The operating system refuses to let files grow, as it does where the disk is full."""
    stopped = processes.run(llama, tmp_path / "job", tmp_path / "out", limits={"RLIMIT_FSIZE": 10_000})
    assert stopped["error"].startswith("OSError")
    assert "00000.safetensors can't be written" in stopped["error"]
    assert "File too large" in stopped["error"]
    resumed = processes.run(llama, tmp_path / "job", tmp_path / "out")
    assert "error" not in resumed
    assert tiny_jobs.contents(tmp_path / "out") == expected


@pytest.mark.parametrize("what", ["save_file", "_write"])
def test_a_full_disk_at_the_second_block(
    what: str, llama: Path, tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_jobs.open_run(llama, tmp_path / "job")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(jobs, what, nth(2, full, getattr(jobs, what)))
        with pytest.raises(OSError, match="No space left"):
            run.run()
    run.close()
    assert Job(tmp_path / "elsewhere", {}).finished(3) == 0
    assert tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "job"), tmp_path / "out") == expected


def test_out_of_memory_in_a_block(
    llama: Path, tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_jobs.open_run(llama, tmp_path / "job")
    with monkeypatch.context() as patched:
        error = torch.OutOfMemoryError("CUDA out of memory")
        patched.setattr(Gptq, "calibrated_many", nth(6, error, Gptq.calibrated_many))
        with pytest.raises(torch.OutOfMemoryError):
            run.run()
    assert run.job.finished(tiny_jobs.BLOCKS) == 1
    assert_nothing_left_behind(run.streamed.model)
    assert tiny_jobs.finish(run, tmp_path / "out") == expected


def assert_nothing_left_behind(model: nn.Module) -> None:
    """Neither hooks nor stand-ins, nor weights of blocks in memory."""
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("at", [1, 9, 30])
def test_interrupted_at_the_keyboard(
    at: int, llama: Path, tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While hooks are in place and blocks in memory."""
    run = tiny_jobs.open_run(llama, tmp_path / "job")
    seen = 0
    add = Collector.add

    def interrupted(*args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            signal.raise_signal(signal.SIGINT)
        add(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Collector, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert_nothing_left_behind(run.streamed.model)
    run.close()
    assert tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "job"), tmp_path / "out") == expected


def test_interrupted_while_the_inputs_of_blocks_are_recorded(
    llama: Path, tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While stand-ins are in the places of blocks; the same object can go on."""
    run = tiny_jobs.open_run(llama, tmp_path / "job")
    with monkeypatch.context() as patched:
        record = runner.Capture.record
        patched.setattr(runner.Capture, "record", nth(5, KeyboardInterrupt(), record))
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert_nothing_left_behind(run.streamed.model)
    assert tiny_jobs.finish(run, tmp_path / "out") == expected


# ---------------------------------------------------------------------------------------------------- damaged files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = [truncate, flip_a_bit, Path.unlink, lambda path: path.write_bytes(b"")]
DAMAGE_NAMES = ["truncated", "a bit flipped", "missing", "empty"]


@pytest.mark.parametrize("damage", DAMAGE, ids=DAMAGE_NAMES)
@pytest.mark.parametrize("name", ["00002.safetensors", "00002.json", "00001.safetensors"])
def test_a_damaged_block_is_done_again(
    name: str, damage: Callable[[Path], object], llama: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    """And those before it are not."""
    run = tiny_jobs.open_run(llama, tmp_path / "job")
    run.run()
    run.close()
    folder, number = tmp_path / "job" / "blocks", int(name[:5])
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    damage(folder / name)
    assert tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "job"), tmp_path / "out") == expected
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [before[file] == after[file] for file in sorted(before)] == [
        int(file[:5]) != number for file in sorted(before)
    ]


@pytest.mark.parametrize("damage", DAMAGE[:2], ids=DAMAGE_NAMES[:2])
@pytest.mark.parametrize("name", ["learning.safetensors", "learning.sum"])
def test_a_damaged_state_of_learning_lets_it_start_over(
    name: str,
    damage: Callable[[Path], object],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = tiny_jobs.gptq(distill=tiny_jobs.LEARNING)
    whole = tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "whole", method), tmp_path / "whole-out")
    run = tiny_jobs.open_run(llama, tmp_path / "job", method)
    steps: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(Job, "save_state", nth(3, KeyboardInterrupt(), Job.save_state))
        patched.setattr(Job, "save", nth(tiny_jobs.BLOCKS + 1, KeyboardInterrupt(), Job.save))
        with pytest.raises(KeyboardInterrupt):
            run.run()
    run.close()
    damage(tmp_path / "job" / name)
    resumed = tiny_jobs.open_run(llama, tmp_path / "job", method)
    accumulate = calibrate.Distillation._accumulate

    def counted(work: Any, tokens: torch.Tensor) -> float:
        steps.append(work.step)
        return accumulate(work, tokens)

    monkeypatch.setattr(calibrate.Distillation, "_accumulate", counted)
    assert tiny_jobs.finish(resumed, tmp_path / "out") == whole
    assert steps == list(range(6))


def test_learning_goes_on_where_it_was(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = tiny_jobs.gptq(distill=tiny_jobs.LEARNING)
    whole = tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "whole", method), tmp_path / "whole-out")
    run = tiny_jobs.open_run(llama, tmp_path / "job", method)
    with monkeypatch.context() as patched:
        patched.setattr(
            calibrate.Distillation, "_accumulate", nth(4, KeyboardInterrupt(), calibrate.Distillation._accumulate)
        )
        with pytest.raises(KeyboardInterrupt):
            run.run()
    steps: list[int] = []
    accumulate = calibrate.Distillation._accumulate

    def counted(work: Any, tokens: torch.Tensor) -> float:
        steps.append(work.step)
        return accumulate(work, tokens)

    monkeypatch.setattr(calibrate.Distillation, "_accumulate", counted)
    assert tiny_jobs.finish(run, tmp_path / "out") == whole
    assert steps == [2, 3, 4, 5]


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_text("[]")], ids=["truncated", "not an object"])
def test_a_damaged_manifest_is_refused(damage: Callable[[Path], object], llama: Path, tmp_path: Path) -> None:
    tiny_jobs.open_run(llama, tmp_path / "job").close()
    damage(tmp_path / "job" / "manifest.json")
    with pytest.raises(PlanError, match="remove the folder to start anew"):
        tiny_jobs.open_run(llama, tmp_path / "job")


# -------------------------------------------------------------------------------------------------- another's folder


def test_a_resumed_job_with_other_weights(llama: Path, tmp_path: Path) -> None:
    tiny_jobs.open_run(llama, tmp_path / "job").close()
    other = tiny_jobs.save_llama(tmp_path / "other", seed=1)
    with pytest.raises(PlanError, match=r"differs in model\.weights;"):
        tiny_jobs.open_run(other, tmp_path / "job")


def test_a_resumed_job_with_weights_that_differ_in_their_middle(llama: Path, tmp_path: Path) -> None:
    tiny_jobs.open_run(llama, tmp_path / "job").close()
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[64:].mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match=r"differs in model\.weights;"):
        tiny_jobs.open_run(tmp_path / "other", tmp_path / "job")


def test_a_resumed_job_with_another_model_config(llama: Path, tmp_path: Path) -> None:
    tiny_jobs.open_run(llama, tmp_path / "job").close()
    other = tiny_jobs.save_llama(tmp_path / "other", rms_norm_eps=1e-3)
    with pytest.raises(PlanError, match=r"differs in model\.config;"):
        tiny_jobs.open_run(other, tmp_path / "job")


ROUNDING = RoundToNearest()
PAPER = Gptq(scale_search="minmax")
OTHERS = collections.defaultdict(lambda: PAPER, {"model.layers.0.mlp.up_proj": ROUNDING})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": tiny_jobs.samples(seed=1)}, "data.fingerprint"),
        ({"bits": 8}, "config.bits"),
        ({"group_size": 64}, "config.group_size"),
        ({"method": tiny_jobs.gptq(batch_tokens=32)}, "data.batch_tokens"),
        ({"method": tiny_jobs.gptq(settings={"level": 1})}, "method.settings.level"),
        ({"method": tiny_jobs.gptq(damp_percent=0.1)}, "method.algorithms.0.damp_percent"),
        ({"method": tiny_jobs.gptq(algorithm_of=lambda name: ROUNDING)}, "method.algorithms.0.block_size"),
        ({"method": tiny_jobs.gptq(algorithm_of=OTHERS.__getitem__)}, "method.algorithms, method.assigned"),
        ({"method": tiny_jobs.gptq(label="awq")}, "method.name"),
        ({"method": tiny_jobs.gptq(true_sequential=False)}, "method.true_sequential"),
        ({"method": tiny_jobs.gptq(tune=tiny_jobs.TUNING)}, "method.tune"),
        ({"method": tiny_jobs.gptq(distill=tiny_jobs.LEARNING)}, "method.distill"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_resumed_job_with_other_settings(changes: dict[str, Any], named: str, llama: Path, tmp_path: Path) -> None:
    tiny_jobs.open_run(llama, tmp_path / "job").close()
    with pytest.raises(PlanError, match=f"differs in {named.replace('.', '[.]')}"):
        tiny_jobs.open_run(llama, tmp_path / "job", **changes)


def test_a_resumed_job_with_another_torch(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_jobs.open_run(llama, tmp_path / "job").close()
    other = {**calibrate.versions(), "torch": "2.0.0"}
    monkeypatch.setattr(calibrate, "versions", lambda: other)
    with pytest.raises(PlanError, match=r"differs in versions\.torch;"):
        tiny_jobs.open_run(llama, tmp_path / "job")


def test_a_folder_that_is_no_job(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "thesis.tex").write_text("")
    with pytest.raises(PlanError, match=r"no job's folder.*thesis\.tex"):
        tiny_jobs.open_run(llama, tmp_path / "job")
    assert [path.name for path in (tmp_path / "job").iterdir() if path.name != "lock"] == ["thesis.tex"]


def test_two_runs_of_one_job(tmp_path: Path) -> None:
    """The second is refused, and takes nothing away from the first: experts are brought into files beside the job."""
    source = tiny_jobs.save_moe(tmp_path / "source")
    expected = tiny_jobs.finish(tiny_jobs.open_run(source, tmp_path / "alone"), tmp_path / "alone-out")
    first = tiny_jobs.open_run(source, tmp_path / "job")
    with pytest.raises(PlanError, match="another process works on the job"):
        tiny_jobs.open_run(source, tmp_path / "job")
    assert tiny_jobs.finish(first, tmp_path / "out") == expected
    tiny_jobs.open_run(source, tmp_path / "job").close()  # nobody works on it any more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "alone-out", "job", "out", "source"]


# ---------------------------------------------------------------------------------------------- numbers out of place


def notes_of(run: Any, out: Path) -> dict[str, Any]:
    """Finish a run; its notes and those of each layer. Whatever was written is finite."""
    tiny_jobs.finish(run, out)
    model = calibrate_loaded(out)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(6, 26)[None]).logits).all())
    report = tiny_jobs.report_of(out)
    return {"run": report["notes"], "layers": tiny_jobs.layer_notes(report), "report": report}


def calibrate_loaded(folder: Path) -> Any:
    import lowbit

    return lowbit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
