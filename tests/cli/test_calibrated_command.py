"""`lowbit quantize` with a dataset: every method and format, what is left on the disk, and what is refused.

But for one, the runs are on the first two blocks of the embedded model, and learn as little as can be chosen: what
calibration reaches is measured elsewhere, this is about the command.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lowbit as library
from lowbit import open_checkpoint
from lowbit.calibration.job import Job
from lowbit.integrations.transformers import calibrated_methods
from lowbit.wire.gguf import open_gguf
from outcome import Lowbit, Outcome

GROUPS = ("--group-size", "64")
ATTENTION = ("--skip", "*.mlp.*")  # of what takes longest, only a part is quantized
RUNS: dict[str, tuple[tuple[str, ...], str, str, int]] = {
    # options, label, format, and how many weights are packed
    "gptq act-order": (("gptq", *GROUPS, "--desc-act", "--damp-percent", "0.05"), "gptq", "gptq", 14),
    "gptq static": (("gptq", *GROUPS, "--desc-act", "--static-groups", "--format", "awq"), "gptq", "awq", 14),
    "gptq corrected": (
        ("gptq", "--bits", "8", "--correction", "--symmetric", "--format", "compressed-tensors"),
        "gptq",
        "compressed-tensors",
        14,
    ),
    "awq": (("awq", *GROUPS), "awq", "awq", 14),
    "awq as gptq": (("awq", "--bits", "3", "--skip", "k_proj", "--format", "gptq"), "awq", "gptq", 12),
    "autoround": (("autoround", *GROUPS), "autoround", "gptq", 14),
    "aqlm": (("aqlm:2x4", *ATTENTION), "aqlm", "aqlm", 8),
    "gguf": (("gguf:Q4_0",), "gguf", "gguf", 14),
    "best": (
        ("best", "--target-bits", "3.6", "--budget", "1s", *ATTENTION, "--format", "compressed-tensors"),
        "best",
        "compressed-tensors",
        8,
    ),
}


FURTHEST = {"aqlm": 0.9, "best": 0.5}  # from the dense logits, relative to them


@dataclass(frozen=True)
class Quick(calibrated_methods.Settings):
    steps: int = 3


@pytest.fixture(scope="module")
def short(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without its last two blocks."""
    folder = tmp_path_factory.mktemp("models") / "short"
    model = transformers.AutoModelForCausalLM.from_pretrained(small, num_hidden_layers=2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, folder / name)
    return folder


@pytest.fixture
def data(small: Path) -> tuple[object, ...]:
    return ("--dataset", small.parent / "sample.txt", "--samples", 4, "--seq-len", 64, "--device", "cpu")


@torch.no_grad()
def logits(path: Path, **kwargs: Any) -> torch.Tensor:
    model = library.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)
    return model(torch.arange(100, 148)[None]).logits


def distance(path: Path, dense: Path) -> float:
    """Of the logits, relative to the dense model's."""
    expected = logits(dense)
    return float((logits(path) - expected).norm() / expected.norm())


def check_report(lowbit: Lowbit, target: Path, label: str, form: str, count: int) -> dict[str, Any]:
    """What the run has written about itself, which `lowbit report` makes a page of."""
    report: dict[str, Any] = json.loads((target / "quantization_report.json").read_text(encoding="utf-8"))
    assert (report["method"], report["format"], len(report["layers"])) == (label, form, count)
    assert report["calibration"]["tokens"] == 4 * 64
    assert all(0 < layer["weight_error"] < 1 for layer in report["layers"])
    page = target.parent / "page.html"
    outcome = lowbit("report", target, "--out", page)
    assert outcome.status == 0, outcome.err
    assert f"{count} quantized" in outcome.out
    assert "Weight error" in page.read_text(encoding="utf-8")
    page.unlink()
    return report


def test_gptq_of_the_whole_model(lowbit: Lowbit, small: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    outcome = lowbit("quantize", small, tmp_path / "model", "--method", "gptq", *GROUPS, *data)
    assert outcome.status == 0, outcome.err
    assert "bits per weight   4.312" in outcome.out
    assert "256 tokens don't determine the Hessian of 768 inputs" in outcome.err
    check_report(lowbit, tmp_path / "model", "gptq", "gptq", 28)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # the job's folder is gone
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert distance(tmp_path / "model", small) < 0.4


@pytest.mark.parametrize("name", RUNS)
def test_each_method(
    lowbit: Lowbit,
    short: Path,
    data: tuple[object, ...],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (method, *options), label, form, count = RUNS[name]
    monkeypatch.setattr(calibrated_methods, "Settings", Quick)
    target = tmp_path / "model"
    outcome = lowbit("quantize", short, target, "--method", method, *options, *data)
    assert outcome.status == 0, outcome.err
    report = check_report(lowbit, target, label, form, count)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    checkpoint = open_checkpoint(target)
    assert len(checkpoint.weights) == count
    assert {layer["name"] for layer in report["layers"]} == set(checkpoint.weights)
    permuted = {tensor.spec.grouping.permuted for tensor in checkpoint.weights.values()}
    assert permuted == {name == "gptq act-order"}
    if label == "best":
        stored = sum(
            tensor.bits_per_weight * tensor.shape[0] * tensor.shape[1] for tensor in checkpoint.weights.values()
        )
        weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in checkpoint.weights.values())
        assert 3.2 < stored / weights <= 3.6
        assert len({tensor.spec.bits for tensor in checkpoint.weights.values()}) > 1
    assert distance(target, short) < FURTHEST.get(label, 0.25)


def test_rotated(lowbit: Lowbit, short: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    target = tmp_path / "model"
    outcome = lowbit("quantize", short, target, "--method", "gptq", "--bits", 8, "--rotate", *data)
    assert outcome.status == 0, outcome.err
    assert "set tie_word_embeddings to False" in outcome.err
    assert json.loads((target / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(target / "model.safetensors")
    check_report(lowbit, target, "gptq", "gptq", 14)
    assert distance(target, short) < 0.03


def test_a_gguf_file(lowbit: Lowbit, short: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    command = ("quantize", short, tmp_path / "model.gguf", "--method", "gguf:Q4_K", *data)
    outcome = lowbit(*command)
    assert outcome.status == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    weights = open_checkpoint(tmp_path / "model.gguf").weights
    assert len(weights) == 14 + 1  # and the embedding, which llama.cpp quantizes too
    assert lowbit("report", tmp_path / "model.gguf", "--out", tmp_path / "page.html").status == 0
    expected = logits(short)
    found = logits(tmp_path / "model.gguf")
    assert float((found - expected).norm() / expected.norm()) < 0.2
    assert "exists; --overwrite replaces it" in lowbit(*command).mistake


def test_a_gguf_file_of_few_bits(lowbit: Lowbit, short: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    """A mixture that needs the data; and what is skipped stays as it is."""
    file = tmp_path / "model.gguf"
    outcome = lowbit("quantize", short, file, "--method", "gguf:IQ2_XS", *ATTENTION, "--skip", "*.1.self_attn.*", *data)
    assert outcome.status == 0, outcome.err
    held = open_gguf(file)
    types = {name: info.type.name for name, info in held.tensors.items() if len(info.shape) == 2}
    assert types.pop("token_embd.weight") == "Q5_K" and types.pop("blk.0.attn_v.weight") == "Q2_K"
    assert {name for name, kind in types.items() if kind == "IQ2_XS"} == {
        f"blk.0.attn_{part}.weight" for part in ("q", "k", "output")
    }
    assert len(types) == 3 + 4 + 2 * 3 and set(types.values()) == {"IQ2_XS", "BF16"}
    assert held.metadata["general.file_type"] == 20
    refusal = lowbit("convert", short, tmp_path / "other.gguf", "--to", "gguf:IQ2_XS").mistake
    assert "--method gguf:IQ2_XS --dataset FILE" in refusal and "Q2_K, IQ3_S or a larger one" in refusal


def stopped(lowbit: Lowbit, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A run that Ctrl-C ends once the first block is filed."""
    save = Job.save

    def save_and_stop(self: Job, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Job, "save", save_and_stop)
        return lowbit(*command)


def test_stopped_runs_go_on(
    lowbit: Lowbit, short: Path, data: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--method", "gptq", *GROUPS, *data)
    command = ("quantize", short, tmp_path / "model", *options)
    interrupted = stopped(lowbit, command, monkeypatch)
    assert interrupted.status == 130
    assert f"the same command goes on where this one was ({tmp_path / '.model.job'})" in interrupted.err
    assert not (tmp_path / "model").exists()
    resumed = lowbit(*command)
    assert resumed.status == 0, resumed.err
    assert "going on behind 1 finished" in resumed.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    kept = ("quantize", short, tmp_path / "other", *options, "--job", tmp_path / "job")
    first = lowbit(*kept)
    assert first.status == 0, first.err
    assert "going on" not in first.err
    assert "is not empty; --overwrite replaces it" in lowbit(*kept).mistake
    again = lowbit(*kept, "--overwrite")
    assert again.status == 0, again.err
    assert "going on behind 2 finished blocks" in again.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "model", "other"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    elsewhere = (*kept, "--overwrite", "--damp-percent", 0.1)
    assert "damp" in lowbit(*elsewhere).mistake  # another run's job


@pytest.fixture(scope="module")
def sources(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized model, an empty text, and a folder that isn't empty."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("quantized", "full"):
        (folder / name).mkdir()
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (folder / "quantized" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "full" / "notes.txt").write_text("not ours", encoding="utf-8")
    (folder / "empty.txt").touch()
    return folder


MISTAKES = {
    "no dataset": ("gptq", "gptq needs calibration data: --dataset FILE"),
    "no such method": (
        "qgtp --dataset TEXT",
        "--method is one of nf4, fp4, int8, fp8, hqq, rtn, gptq, awq, autoround, aqlm, gguf, best; found 'qgtp'",
    ),
    "a dataset for nothing": ("rtn --dataset TEXT", "rtn takes no calibration data"),
    "target bits": ("gptq --dataset TEXT --target-bits 3.6", "--target-bits and --budget are for best, not for gptq"),
    "budget": ("awq --dataset TEXT --budget 10m", "--target-bits and --budget are for best, not for awq"),
    "no type": ("gguf --dataset TEXT", "say which type: --method gguf:Q4_K_M"),
    "no such type": ("gguf:Q9_Z --dataset TEXT", "(found 'Q9_Z'"),
    "codebooks": ("aqlm:two --dataset TEXT", "codebooks are given as <number>x<bits>, such as aqlm:2x8; found 'two'"),
    "a variant": ("gptq:Q4_0 --dataset TEXT", "'gptq' has no variants; found 'Q4_0'"),
    "a variant of rounding": ("rtn:4", "'rtn' has no variants; found '4'"),
    "a budget of no unit": (
        "best --bits 4 --dataset TEXT --budget 10",
        "a number and s, m or h, as in 10m; found '10'",
    ),
    "a budget of nothing": (
        "best --bits 4 --dataset TEXT --budget 0m",
        "a number and s, m or h, as in 10m; found '0m'",
    ),
    "a budget in words": ("best --bits 4 --dataset TEXT --budget soon", "as in 10m; found 'soon'"),
    "no bits": ("best --dataset TEXT", "best needs --bits or --target-bits"),
    "best as awq": (
        "best --bits 4 --dataset TEXT --format awq",
        "best is written as gptq or compressed-tensors, not as awq",
    ),
    "act-order": ("gptq --dataset TEXT --desc-act --format awq", "stores a group index, which awq has not"),
    "bits of a format": ("gptq --dataset TEXT --bits 3 --format awq", "awq has 4 bits, not 3"),
    "a format": ("aqlm --dataset TEXT --format gptq", "aqlm is written as aqlm, not as gptq"),
    "no such format": ("gptq --dataset TEXT --format gtpq", "--format is one of bitsandbytes, gptq, awq,"),
    "a pattern": ("gptq --dataset TEXT --skip nothing", "--skip 'nothing' matches no linear layer"),
    "no file": ("gptq --dataset no.txt", "there is no file 'no.txt'"),
    "no text": ("gptq --dataset EMPTY", "is an empty text"),
    "too long": ("gptq --dataset TEXT --seq-len 4096", "4096"),
    "no one device": ("gptq --dataset TEXT --device auto", "calibration works on one device"),
    "damping": ("gptq --dataset TEXT --damp-percent 2", "--damp-percent"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_take_one_line(
    lowbit: Lowbit, small: Path, short: Path, sources: Path, tmp_path: Path, name: str
) -> None:
    line, message = MISTAKES[name]
    places = {"TEXT": str(small.parent / "sample.txt"), "EMPTY": str(sources / "empty.txt")}
    words = [places.get(word, word) for word in line.split()]
    words += ["--samples", "2"] if "--dataset" in words else []
    assert message in lowbit("quantize", short, tmp_path / "model", "--method", *words).mistake
    assert list(tmp_path.iterdir()) == []


def test_sources_and_targets_that_are_refused(
    lowbit: Lowbit, short: Path, sources: Path, data: tuple[object, ...], tmp_path: Path
) -> None:
    options = ("--method", "gptq", *data)
    assert "is quantized already (gptq)" in lowbit("quantize", sources / "quantized", tmp_path / "a", *options).mistake
    assert "is not empty" in lowbit("quantize", short, sources / "full", *options).mistake
    assert "not a checkpoint" in lowbit("quantize", short, sources / "full", *options, "--overwrite").mistake
    assert "--method gguf:TYPE makes one" in lowbit("quantize", short, tmp_path / "a.gguf", *options).mistake
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in (sources / "full").iterdir()] == ["notes.txt"]
