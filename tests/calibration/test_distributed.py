"""Several processes on one job: the bytes of a single one, whoever begins it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import decoders
import ranks
from lowbit.calibration.distributed import LEAVES, TreeSum, leaf_of
from lowbit.cli import main

CASES = list(ranks.CASES)
WITH_TWO = [*CASES, "llama@1"]
WITH_THREE = ["tuned", "one_batch", "mixtral@2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what one, two and three processes made of every case."""
    folder = tmp_path_factory.mktemp("processes")
    for kind in ("llama", "mixtral", "t5", "broken"):
        model = decoders.save("gpt2" if kind == "broken" else kind, folder / "models" / kind)
        if kind == "broken":
            with torch.no_grad():
                model.transformer.wpe.weight[20:] = torch.nan
            model.save_pretrained(folder / "models" / kind)
    ranks.work(folder, "1", CASES)
    command = [sys.executable, ranks.__file__, str(folder), "2", *WITH_TWO, "--", "3", *WITH_THREE]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks.work(folder, "1", ["tuned@2"])
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint; of the report all but how long it took."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["quantization_report.json"] = timeless(json.loads(found["quantization_report.json"]))
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key != "seconds"}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("processes", "case"),
    [*(("2", case) for case in WITH_TWO), *(("3", case) for case in WITH_THREE), ("1", "tuned@2")],
)
def test_the_bytes_of_a_single_process(folder: Path, processes: str, case: str) -> None:
    alone, together = folder / "1" / case.partition("@")[0], folder / processes / case
    expected = contents(alone / "out")
    assert contents(together / "out") == expected
    assert "model.safetensors" in expected
    jobs = [
        {path.name: path.read_bytes() for path in (own / "job" / "blocks").glob("*.safetensors")}
        for own in (alone, together)
    ]
    assert jobs[0] == jobs[1]


def test_reports_hold_what_every_process_knows(folder: Path) -> None:
    for case in ("llama", "mixtral", "first_is_bad", "last_is_bad"):
        report = json.loads((folder / "2" / case / "out" / "quantization_report.json").read_bytes())
        tokens = [layer["tokens"] for layer in report["layers"] if ".experts." not in layer["name"]]
        bad = case.endswith("bad")
        assert set(tokens) == {16 if bad else ranks.CASES[case][2].numel()}
        assert any("left out" in note for note in report["notes"]) == bad
        assert all("output_error" in layer for layer in report["layers"])


def test_nothing_is_left_beside_the_jobs(folder: Path) -> None:
    for own in (folder / "3").iterdir():
        assert {path.name for path in own.iterdir()} == {"job", "out"}
        assert "activations" not in {path.name for path in (own / "job").iterdir()}


@pytest.mark.parametrize("batches", [1, 2, 3, 7, 8, 9, 30])
def test_runs_of_batches_do_not_depend_on_processes(batches: int) -> None:
    leaves = [leaf_of(batch, batches) for batch in range(batches)]
    assert leaves == sorted(leaves) and leaves[0] == 0 and max(leaves) < LEAVES


def test_sums_follow_one_tree() -> None:
    values = [torch.tensor(float(10**number)) if number != 3 else None for number in range(7)]
    tree = TreeSum()
    for value in values:
        tree.push(value)
    assert tree.total() == 1110111.0
    assert TreeSum().total() is None


def test_torchrun_quantizes_as_one_process_does(small: Path, tmp_path: Path) -> None:
    config = t.LlamaConfig(**decoders.GROUPED | {"vocab_size": 8192})
    t.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    for path in small.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "dense")
    (tmp_path / "text.txt").write_text("A text of several words to learn from, and of some more. " * 40)
    arguments = ["--method", "gptq", "--group-size", "32", "--dataset", str(tmp_path / "text.txt")]
    arguments += ["--samples", "4", "--seq-len", "32"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lowbit", "quantize", str(tmp_path / "dense"), str(tmp_path / "two"), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "one"), *arguments]) == 0
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
