"""What may befall a calibrated run: kills, full disks, damaged files, bad data. It ends right or says what is wrong."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import json
import math
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
from safetensors import SafetensorError
from torch import nn

import lowbit
import tiny_jobs
from lowbit.algorithms import RoundToNearest, factor
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.statistics import HESSIAN, MAGNITUDES, Collector
from lowbit.calibration import activations, flow
from lowbit.calibration import job as jobs
from lowbit.calibration.data import Calibration, DataConfig, load_calibration
from lowbit.calibration.job import Job
from lowbit.errors import PlanError
from lowbit.integrations.transformers import calibrate
from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun
from lowbit.integrations.transformers.calibrated_methods import Equalizer
from memory_cgroup import memory_cgroup

CPU = torch.device("cpu")


class Processes:
    """Runs in processes of their own, made by one that has imported everything."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("job_process.py")
        # Memory that is freed goes back to the system, so that what is measured is what is used.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
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


@pytest.fixture(scope="module")
def learned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same with learning afterwards."""
    folder = tmp_path_factory.mktemp("learned")
    method = tiny_jobs.gptq(distill=tiny_jobs.LEARNING)
    return tiny_jobs.finish(tiny_jobs.open_run(llama, folder / "job", method), folder / "out")


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
    stopped = processes.run(llama, tmp_path / "job", tmp_path / "out", file_bytes=10_000)
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
        record = flow.Capture.record
        patched.setattr(flow.Capture, "record", nth(5, KeyboardInterrupt(), record))
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
    learned: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = tiny_jobs.gptq(distill=tiny_jobs.LEARNING)
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
    assert tiny_jobs.finish(resumed, tmp_path / "out") == learned
    assert steps == list(range(6))


def test_learning_goes_on_where_it_was(
    llama: Path, learned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = tiny_jobs.gptq(distill=tiny_jobs.LEARNING)
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
    assert tiny_jobs.finish(run, tmp_path / "out") == learned
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


@dataclasses.dataclass
class Outcome:
    """What a run says: its notes, and of each layer its notes and its facts."""

    run: list[str]
    layers: dict[str, list[str]]
    facts: dict[str, dict[str, Any]]


def outcome(run: CalibratedRun, out: Path) -> Outcome:
    """Finish a run, and see that what was written gives finite numbers."""
    tiny_jobs.finish(run, out)
    model = lowbit.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(6, 26)[None]).logits).all())
    report = tiny_jobs.report_of(out)
    facts = {layer["name"]: layer for layer in report["layers"]}
    assert all(math.isfinite(layer["output_error"]) for layer in facts.values())
    return Outcome(report["notes"], {name: layer["notes"] for name, layer in facts.items()}, facts)


def changed_model(source: Path, folder: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a model with other weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def test_inputs_that_are_all_zero(llama: Path, tmp_path: Path) -> None:
    source = changed_model(
        llama, tmp_path / "model", lambda model: model.model.layers[1].input_layernorm.weight.zero_()
    )
    found = outcome(tiny_jobs.open_run(source, tmp_path / "job"), tmp_path / "out")
    for name, notes in found.layers.items():
        zero = name.startswith("model.layers.1.self_attn")
        assert notes == (["all inputs of this layer were 0: its weights were rounded to nearest"] if zero else []), name
        assert found.facts[name]["fallback"] == zero


def test_a_singular_hessian_without_damping(llama: Path, tmp_path: Path) -> None:
    """One token, again and again: every Hessian is of rank one."""
    same = Calibration([torch.full((32,), 9)], "one token")
    found = outcome(tiny_jobs.open_run(llama, tmp_path / "job", tiny_jobs.gptq(0.0), same), tmp_path / "out")
    for name, notes in found.layers.items():
        size = found.facts[name]["shape"][1]
        assert f"32 tokens don't determine the Hessian of {size} inputs" in notes, name
        assert found.facts[name]["attempts"] > 1
        assert any("could be factorized only with" in note for note in notes), name


def test_a_hessian_that_cannot_be_factorized(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invert = factor._inverse_factor

    def failing(hessian: torch.Tensor, damp: float, dtype: torch.dtype) -> torch.Tensor | None:
        return None if len(hessian) == 128 else invert(hessian, damp, dtype)

    monkeypatch.setattr(factor, "_inverse_factor", failing)
    found = outcome(tiny_jobs.open_run(llama, tmp_path / "job"), tmp_path / "out")
    for name, notes in found.layers.items():
        assert found.facts[name]["fallback"] == name.endswith("down_proj")
        assert any("could not be factorized" in note for note in notes) == name.endswith("down_proj")


def test_an_expert_that_no_token_reaches(tmp_path: Path) -> None:
    """It is quantized from what all experts saw, and that is said."""
    source = tiny_jobs.save_moe(tmp_path / "model", dead=2)
    found = outcome(tiny_jobs.open_run(source, tmp_path / "job"), tmp_path / "out")
    dead = [name for name in found.layers if ".experts.2." in name]
    assert len(dead) == 2 * 3
    for name in dead:
        assert found.facts[name]["tokens"] == 0
        assert found.layers[name][-1].startswith("the expert saw 0 tokens")


def test_an_expert_that_few_tokens_reach(tmp_path: Path) -> None:
    """Its statistics are widened, and that is said."""
    source = tiny_jobs.save_moe(tmp_path / "model", rare=1)
    ids = torch.randint(6, 100, (8, 32), generator=torch.Generator().manual_seed(0))
    ids[3, 4] = ids[5, 6] = tiny_jobs.TOKEN_OF_RARE_EXPERT
    found = outcome(
        tiny_jobs.open_run(source, tmp_path / "job", data=Calibration(list(ids), "random")), tmp_path / "out"
    )
    name = "model.layers.0.mlp.experts.1.gate_proj"
    assert found.facts[name]["tokens"] == 2
    assert found.layers[name][-1] == "the expert saw 2 tokens: 62 as all experts of the layer saw were lent to it"


def test_a_token_that_the_model_gives_nan(llama: Path, tmp_path: Path) -> None:
    """The sequences with it are left out, and no others; what comes out is what the others alone give."""
    nan = tiny_jobs.WITHOUT_INPUTS
    source = changed_model(
        llama, tmp_path / "model", lambda model: model.model.embed_tokens.weight[nan].fill_(math.nan)
    )
    data = tiny_jobs.samples()
    spoiled = torch.stack(data.samples)
    spoiled[5, 7] = nan
    found = outcome(tiny_jobs.open_run(source, tmp_path / "job", data=Calibration(list(spoiled), "")), tmp_path / "out")
    assert found.run == [
        "1 calibration sequences were left out: the model's embeddings of 1 tokens ([127]) are NaN or infinite"
    ]
    others = Calibration([sample for number, sample in enumerate(spoiled) if number != 5], "")
    tiny_jobs.finish(tiny_jobs.open_run(source, tmp_path / "others", data=others), tmp_path / "others-out")
    assert tiny_jobs.tensors_of(tmp_path / "out") == tiny_jobs.tensors_of(tmp_path / "others-out")


def test_nan_for_every_sequence(llama: Path, tmp_path: Path) -> None:
    source = changed_model(llama, tmp_path / "model", lambda model: model.model.embed_tokens.weight.fill_(math.nan))
    with pytest.raises(PlanError, match="no calibration sequence is usable"):
        tiny_jobs.open_run(source, tmp_path / "job")


def test_a_block_that_overflows_for_some_sequences(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left out from there on; so they are after a restart."""
    forward = transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward

    def overflowing(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = forward(layer, hidden_states, *args, **kwargs)
        first = float(kwargs["position_embeddings"][0].sum()) and layer.self_attn.layer_idx == 1
        return out + math.inf if first and len(out) == 1 else out

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", overflowing)
    data = tiny_jobs.samples(count=7)  # the last batch is of one sequence
    expected = tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "job", data=data), tmp_path / "out")
    note = "1 calibration sequences were left out: model.layers.1 gives NaN or infinite numbers for them"
    assert expected["quantization_report.json"]["notes"] == [note]
    assert [layer["tokens"] for layer in expected["quantization_report.json"]["layers"][::7]] == [224, 224, 192]
    Path.unlink(tmp_path / "job" / "blocks" / "00002.json")
    assert tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "job", data=data), tmp_path / "again") == expected


@pytest.mark.parametrize(
    ("weight", "message"), [(3e38, "inputs of a layer are NaN.*overflow"), (1e25, "hessian holds NaN or infinite")]
)
def test_a_block_that_overflows_for_all(weight: float, message: str, llama: Path, tmp_path: Path) -> None:
    """Its inputs, or their squares, are more than fp32 holds."""
    source = changed_model(
        llama, tmp_path / "model", lambda model: model.model.layers[1].post_attention_layernorm.weight.fill_(weight)
    )
    run = tiny_jobs.open_run(source, tmp_path / "job")
    with pytest.raises(PlanError, match=rf"model\.layers\.1\.mlp\.\w+_proj.*: .*{message}"):
        run.run()
    assert run.job.finished(tiny_jobs.BLOCKS) == 1
    run.close()


def test_weights_that_no_scale_reaches(llama: Path, tmp_path: Path) -> None:
    source = changed_model(
        llama, tmp_path / "model", lambda model: model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    )
    run = tiny_jobs.open_run(source, tmp_path / "job")
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp\.up_proj.*: .*more than its dtype holds"):
        run.run()
    run.close()


@pytest.mark.parametrize("data", [[], [""], torch.zeros(0, 8, dtype=torch.int64)], ids=["no", "empty text", "no ids"])
def test_an_empty_data_set(data: Any, small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    with pytest.raises(PlanError, match="is empty|has no tokens"):
        load_calibration(data, tokenizer, DataConfig(samples=4, length=8))


def test_a_run_without_samples(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no calibration samples"):
        CalibratedRun(llama, lowbit.GPTQConfig(bits=4), tiny_jobs.gptq(), Calibration([], ""), tmp_path, CPU)


def test_a_token_that_the_model_does_not_have(llama: Path, tmp_path: Path) -> None:
    data = Calibration([torch.tensor([6, tiny_jobs.VOCABULARY])], "")
    with pytest.raises(PlanError, match="token id 128"):
        tiny_jobs.open_run(llama, tmp_path / "job", data=data)


# ------------------------------------------------------------------------------------------- where activations are


@pytest.fixture
def _on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Activations become files whatever their size; gives the folders that they were in."""
    used: list[str] = []
    put = flow.Activations.put

    def recorded(store: Any, batch: int, hidden: torch.Tensor) -> None:
        assert store.place == "disk"
        used.append(store._folder.name)
        put(store, batch, hidden)

    monkeypatch.setattr(flow, "choose_place", lambda *args: "disk")
    monkeypatch.setattr(flow.Activations, "put", recorded)
    return used


def in_memory_and_on_disk(
    source: Path, method: Calibrated, folder: Path, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    memory = tiny_jobs.finish(tiny_jobs.open_run(source, folder / "job", method), folder / "out")
    used = request.getfixturevalue("_on_disk")
    disk = tiny_jobs.finish(tiny_jobs.open_run(source, folder / "disk", method), folder / "disk-out")
    assert not (folder / "disk" / "activations").exists()
    return memory, disk, used


@pytest.mark.parametrize("tune", [None, tiny_jobs.TUNING], ids=["gptq", "tuned"])
def test_activations_in_files(tune: Any, llama: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    memory, disk, used = in_memory_and_on_disk(llama, tiny_jobs.gptq(tune=tune), tmp_path, request)
    assert disk == memory
    assert set(used) == ({"hidden-0", "dense-0"} if tune else {"hidden-0"})


@pytest.mark.usefixtures("_on_disk")
def test_a_full_disk_while_activations_are_kept(
    llama: Path, tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second block; the first is not lost."""
    run = tiny_jobs.open_run(llama, tmp_path / "job")
    with monkeypatch.context() as patched:
        full = SafetensorError("I/O error: No space left on device (os error 28)")
        patched.setattr(activations, "save_file", nth(10, full, activations.save_file))
        with pytest.raises(OSError, match=r"000001\.safetensors can't be written: .*No space left"):
            run.run()
    assert run.job.finished(tiny_jobs.BLOCKS) == 1
    assert tiny_jobs.finish(run, tmp_path / "out") == expected


def test_activations_of_two_stacks_in_files(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 128}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    memory, disk, used = in_memory_and_on_disk(tmp_path / "model", tiny_jobs.gptq(), tmp_path, request)
    assert disk == memory
    assert used


# ------------------------------------------------------------------------------------------------ parameters that move


SCALED = {"prepare": Equalizer(False), "prepare_needs": frozenset({HESSIAN, MAGNITUDES})}


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("changes", [{"tune": tiny_jobs.TUNING}, SCALED], ids=["learned", "scaled"])
def test_norms_that_change_are_the_same_after_a_restart(
    changes: dict[str, Any], after: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change in fp32 and are filed in the model's dtype; what follows sees what is filed."""
    method = tiny_jobs.gptq(**changes)
    whole = tiny_jobs.finish(tiny_jobs.open_run(llama, tmp_path / "whole", method), tmp_path / "whole-out")
    moved = [name for name in whole if name.endswith("layernorm.weight")]
    dense = tiny_jobs.tensors_of(llama)
    assert any(whole[name] != dense[name] for name in moved)
    run = tiny_jobs.open_run(llama, tmp_path / "job", method)
    with monkeypatch.context() as patched:
        patched.setattr(Job, "save", nth(after + 1, KeyboardInterrupt(), Job.save))
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert tiny_jobs.finish(run, tmp_path / "out") == whole


# -------------------------------------------------------------------------------------------------------------- memory

MIB = 2**20
WIDE: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072}
BLOCK = 4 * (768 * (768 + 384 + 384 + 768) + 3 * 768 * 3072)  # bytes of a block's linears in fp32
DEPTH = 12
# The block itself, the next one in bf16, what rounding takes for two of its largest weights, and activations.
NEEDED = 3 * BLOCK + 16 * MIB


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 MiB in bf16."""
    folder = tmp_path_factory.mktemp("wide")
    with torch.device("meta"):
        config = transformers.LlamaConfig(**{**tiny_jobs.SIZES, **WIDE, "num_hidden_layers": DEPTH})
        model = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_model_larger_than_the_memory(wide: Path, processes: Processes, tmp_path: Path) -> None:
    """A process that may take a few blocks, less than the dense model, quantizes and writes it; it is killed otherwise.

    What is mapped from files, and can be dropped at any time, is left out. (It counts against RLIMIT_AS and, where it
    is mapped privately as torch does it, against RLIMIT_DATA.)
    """
    assert 0.6 * (wide / "model.safetensors").stat().st_size > NEEDED
    answer = processes.run(wide, tmp_path / "job", tmp_path / "out", round=True, samples=2, memory_bytes=NEEDED)
    assert answer["status"] == 0
    assert "error" not in answer
    assert len(tiny_jobs.report_of(tmp_path / "out")["layers"]) == 7 * DEPTH
    refused = processes.run(wide, tmp_path / "less", tmp_path / "no", round=True, samples=2, memory_bytes=BLOCK)
    assert refused["status"] == -signal.SIGKILL  # so it is a limit


@contextlib.contextmanager
def limited(megabytes: float) -> Iterator[dict[str, str]]:
    """What a request says to be held to so much by the system itself."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(memory_cgroup(int(megabytes * MIB)))
        except OSError as error:
            pytest.skip(f"no cgroup can be made here: {error}")
        yield {"cgroup": str(folder)}


def test_a_model_larger_than_its_cgroup(wide: Path, processes: Processes, tmp_path: Path) -> None:
    """The system kills a process that takes more; it has some memory beside what was allocated, for its own tables."""
    dense, needed = (wide / "model.safetensors").stat().st_size / MIB, NEEDED / MIB + 32
    assert needed < 0.8 * dense
    with limited(needed) as limit:
        answer = processes.run(wide, tmp_path / "job", tmp_path / "out", round=True, samples=2, **limit)
    assert answer["status"] == 0
    assert "error" not in answer
    assert len(tiny_jobs.report_of(tmp_path / "out")["layers"]) == 7 * DEPTH
    with limited(BLOCK / MIB) as limit:
        refused = processes.run(wide, tmp_path / "less", tmp_path / "no", round=True, samples=2, **limit)
    assert refused["status"] == -signal.SIGKILL
