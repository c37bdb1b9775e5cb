"""Each command, on the embedded model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit import open_checkpoint, register, unregister
from lowbit.errors import LowbitError
from lowbit.wire import wires
from outcome import Lowbit

RTN = ("--method", "rtn")
METHODS: dict[str, tuple[tuple[str, ...], str, float]] = {
    "nf4": (("--method", "nf4"), "bitsandbytes-4bit", 4.6),
    "nf4 nested": (("--method", "nf4", "--double-quant"), "bitsandbytes-4bit", 4.25),
    "fp4": (("--method", "fp4"), "bitsandbytes-4bit", 4.6),
    "int8": (("--method", "int8"), "bitsandbytes-8bit", 8.2),
    "rtn": (RTN, "gptq", 4.2),
    "rtn symmetric": ((*RTN, "--symmetric"), "gptq", 4.2),
    "rtn 3 bits": ((*RTN, "--bits", "3", "--group-size", "64"), "gptq", 3.4),
    "rtn 2 bits": ((*RTN, "--bits", "2", "--group-size", "32"), "gptq", 2.7),
    "rtn 8 bits": ((*RTN, "--bits", "8", "--group-size", "-1"), "gptq", 8.2),
    "awq": ((*RTN, "--format", "awq"), "awq", 4.2),
    "awq symmetric": ((*RTN, "--format", "awq", "--symmetric", "--group-size", "32"), "awq", 4.7),
}


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


@pytest.mark.parametrize("name", METHODS)
def test_quantize_inspect_and_load(lowbit: Lowbit, registered: None, small: Path, tmp_path: Path, name: str) -> None:
    options, form, most_bits = METHODS[name]
    target = tmp_path / "model"
    outcome = lowbit("quantize", small, target, *options)
    assert outcome.status == 0, outcome.err
    assert "model.layers.*.mlp.down_proj (4)" in outcome.out
    assert "times smaller" in outcome.out
    assert (target / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()

    report = lowbit("inspect", target, "--json").json
    assert set(report) == {"format", "bits_per_weight", "weights", "kept"}
    assert report["format"] == form
    assert report["bits_per_weight"] < most_bits
    checkpoint = open_checkpoint(target)
    assert [entry["name"] for entry in report["weights"]] == list(checkpoint.weights)
    for entry in report["weights"]:
        assert set(entry) == {"name", "shape", "bits_per_weight", "spec"}
        tensor = checkpoint.weights[entry["name"]]
        assert entry["shape"] == list(tensor.shape)
        assert entry["bits_per_weight"] == tensor.bits_per_weight
        assert entry["spec"] == str(tensor.spec)
    assert report["kept"] == [{"name": "model.embed_tokens", "reason": "stored dense (bf16)"}]

    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    output = model.generate(
        **tokenizer("The river", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2
    )
    assert output.shape[1] > 2


def test_inspect_prints_a_table(lowbit: Lowbit, small: Path) -> None:
    outcome = lowbit("inspect", small)
    assert outcome.status == 0
    assert "dense" in outcome.out
    assert "kept: stored dense (bf16)" in outcome.out


def test_inspect_of_a_dense_checkpoint(lowbit: Lowbit, small: Path) -> None:
    report = lowbit("inspect", small, "--json").json
    assert report["format"] == "dense"
    assert report["bits_per_weight"] == 16
    assert report["weights"] == []
    assert {"name": "model.layers.0.mlp.up_proj", "reason": "stored dense (bf16)"} in report["kept"]
    assert len(report["kept"]) == 29


@pytest.mark.parametrize("form", ["bitsandbytes", "gptq", "awq"])
def test_skipped_modules_stay_dense_for_every_reader(
    lowbit: Lowbit, registered: None, small: Path, tmp_path: Path, form: str
) -> None:
    method = ("--method", "int8") if form == "bitsandbytes" else (*RTN, "--format", form)
    options = (*method, "--skip", "k_proj", "--skip", "model.layers.1", "--skip", r"model\.layers\.[23]\.mlp")
    assert lowbit("quantize", small, tmp_path / "model", *options).status == 0
    left = {entry["name"] for entry in lowbit("inspect", tmp_path / "model", "--json").json["weights"]}
    assert not [name for name in left if "k_proj" in name or "layers.1." in name]
    assert "model.layers.0.mlp.up_proj" in left
    assert "model.layers.2.self_attn.q_proj" in left
    assert "model.layers.2.mlp.up_proj" not in left
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear


def test_eval(lowbit: Lowbit, small: Path, tmp_path: Path, text: Path) -> None:
    measure = ("--text", text, "--seq-len", 64, "--max-windows", 3)
    dense = lowbit("eval", small, *measure, "--json").json
    assert set(dense) == {"perplexity", "tokens", "bits_per_weight", "memory_bytes"}
    assert dense["tokens"] == 3 * 63
    assert dense["bits_per_weight"] == 16
    model = transformers.AutoModelForCausalLM.from_pretrained(small)
    assert dense["memory_bytes"] == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert 10 < dense["perplexity"] < 100

    assert lowbit("quantize", small, tmp_path / "model", *RTN, "--bits", 3).status == 0
    quantized = lowbit("eval", tmp_path / "model", *measure, "--dtype", "float32", "--device", "cpu", "--json").json
    assert quantized["tokens"] == dense["tokens"]
    assert quantized["perplexity"] > dense["perplexity"]
    weights = open_checkpoint(tmp_path / "model").weights
    held, count = sum(w.nbytes for w in weights.values()), sum(math.prod(w.shape) for w in weights.values())
    assert quantized["bits_per_weight"] == 8 * held / count

    shown = lowbit("eval", small, *measure)
    assert f"perplexity        {dense['perplexity']:.4f}" in shown.out
    assert "189 predicted, 3 windows of 64" in shown.out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["rtn", "nf4", "int8"])
def test_on_a_gpu(lowbit: Lowbit, small: Path, tmp_path: Path, text: Path, name: str) -> None:
    measure = ("--text", text, "--seq-len", 64, "--json")
    reports = {}
    for device in ("cpu", "cuda"):
        target = tmp_path / device
        assert lowbit("quantize", small, target, *METHODS[name][0], "--device", device).status == 0
        reports[device] = lowbit("eval", target, *measure, "--device", device).json
    assert reports["cuda"] == {**reports["cpu"], "perplexity": pytest.approx(reports["cpu"]["perplexity"], rel=0.01)}
    default = lowbit("eval", tmp_path / "cuda", *measure).json
    assert default["perplexity"] == pytest.approx(reports["cuda"]["perplexity"], rel=1e-3)


def test_json_is_all_there_is(lowbit: Lowbit, small: Path, text: Path) -> None:
    outcome = lowbit("eval", small, "--text", text, "--seq-len", 64, "--max-windows", 1, "--json")
    assert outcome.err == ""
    json.loads(outcome.out)


def test_doctor(lowbit: Lowbit) -> None:
    report = lowbit("doctor", "--json").json
    assert report["torch"] == torch.__version__.partition("+")[0] or report["torch"] == torch.__version__
    assert report["transformers"] == transformers.__version__
    assert report["transformers_range"]["tested"] is True
    assert report["devices"][-1]["device"] == "cpu"
    assert report["wires"] == [wire.name for wire in wires()]
    assert len(report["wires"]) == 12  # eleven formats, of which bitsandbytes has two
    types = list(dict.fromkeys(device["device"].partition(":")[0] for device in report["devices"]))
    assert [(entry["device"], entry["problem"]) for entry in report["kernels"]] == [
        (device, problem) for device in types for problem in ("int4, groups of 128", "nf4", "int8")
    ]
    for entry in report["kernels"]:
        assert entry["kernels"][-1] == {"name": "torch", "refusal": None}
    assert "runs on cuda, not on cpu" in str(report["kernels"])

    shown = lowbit("doctor")
    assert shown.status == 0
    assert "in the tested range" in shown.out
    assert "kernels for nf4" in shown.out


def test_version(lowbit: Lowbit) -> None:
    import lowbit as package

    assert lowbit("--version").out.strip() == package.__version__


@pytest.mark.parametrize("words", [(), ("--help",), ("quantize", "--help")])
def test_help(lowbit: Lowbit, words: tuple[str, ...]) -> None:
    outcome = lowbit(*words)
    assert outcome.status == 0
    assert "Usage" in outcome.out


class TestMistakes:
    """Each ends with status 2 and one line on stderr."""

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (("frobnicate",), "No such command 'frobnicate'"),
            (("eval",), "Missing argument 'PATH'"),
            (("eval", "SMALL"), "give a text to measure on with --text FILE"),
            (("eval", "SMALL", "--text", "/no/such/file"), "the text '/no/such/file' can't be read: No such file"),
            (("eval", "SMALL", "--text", "TEXT", "--seq-len", "4096"), "longer than the model's 1024 positions"),
            (("eval", "SMALL", "--text", "TEXT", "--seq-len", "1024"), "less than one window of 1024"),
            (("eval", "SMALL", "--text", "TEXT", "--seq-len", "1"), "--seq-len"),
            (("eval", "SMALL", "--text", "TEXT", "--seq-len", "8", "--dtype", "int3"), "--dtype"),
            (("eval", "SMALL", "--text", "TEXT", "--seq-len", "8", "--device", "toaster"), "no device 'toaster'"),
            (("eval", "SMALL", "--text", "TEXT", "--seq-len", "8", "--device", "meta"), "meta"),
            (("inspect", "/no/such/folder"), "there is no folder '/no/such/folder'"),
            (("inspect", "TEXT"), "is a file"),
            (("inspect", "EMPTY"), "is not a checkpoint"),
            (("quantize", "SMALL", "NEW"), "Missing option '--method'"),
            (("quantize", "SMALL", "NEW", "--method", "magic"), "--method"),
            (("quantize", "SMALL", "NEW", "--method", "nf4", "--format", "gptq"), "not as gptq"),
            (("quantize", "SMALL", "SMALL", "--method", "nf4"), "the source itself"),
            (("quantize", "SMALL", "FULL", "--method", "nf4"), "is not empty; --overwrite replaces it"),
            (("quantize", "SMALL", "FULL", "--method", "nf4", "--overwrite"), "not a checkpoint"),
            (
                ("quantize", "SMALL", "NEW", "--method", "nf4", "--skip", "frob"),
                "--skip 'frob' matches no linear layer",
            ),
            (("quantize", "SMALL", "NEW", "--method", "nf4", "--skip", "(a"), "not a regular expression"),
            (("quantize", "SMALL", "NEW", "--method", "rtn", "--skip", "model"), "nothing in this model"),
            (("demo", "--plot", "plot.txt"), "a plot is written as .png, .svg, .pdf"),
            (("demo", "--plot", "/no/such/folder/plot.png"), "there is no folder /no/such/folder"),
        ],
    )
    def test_mistake(self, lowbit: Lowbit, small: Path, text: Path, tmp_path: Path, words: Any, reason: str) -> None:
        names = {"SMALL": small, "TEXT": text, **{name: tmp_path / name for name in ("EMPTY", "FULL", "NEW")}}
        (tmp_path / "EMPTY").mkdir()
        (tmp_path / "FULL").mkdir()
        (tmp_path / "FULL" / "thesis.txt").touch()
        outcome = lowbit(*(names.get(word, word) for word in words))
        assert reason in outcome.mistake
        assert not (tmp_path / "NEW").exists()

    def test_a_quantized_source(self, lowbit: Lowbit, small: Path, tmp_path: Path) -> None:
        assert lowbit("quantize", small, tmp_path / "one", *RTN).status == 0
        assert "is quantized already (gptq)" in lowbit("quantize", tmp_path / "one", tmp_path / "two", *RTN).mistake

    def test_a_text_that_is_not_utf8(self, lowbit: Lowbit, small: Path, tmp_path: Path) -> None:
        (tmp_path / "text").write_bytes(b"abc \xff")
        assert "is not UTF-8" in lowbit("eval", small, "--text", tmp_path / "text").mistake

    def test_a_damaged_checkpoint(self, lowbit: Lowbit, small: Path, tmp_path: Path) -> None:
        assert lowbit("quantize", small, tmp_path / "model", *RTN).status == 0
        file = tmp_path / "model" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert "is not a valid safetensors file" in lowbit("inspect", tmp_path / "model").mistake

    def test_a_config_that_transformers_does_not_know(self, lowbit: Lowbit, text: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "frobnicator"}')
        outcome = lowbit("eval", tmp_path, "--text", text)
        assert "Transformers can't read the config" in outcome.mistake

    def test_a_name_that_the_hub_does_not_know(
        self, lowbit: Lowbit, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str, **_: Any) -> None:
            raise OSError(f"404 for {name}\nand much advice")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        outcome = lowbit("eval", "nobody/nothing", "--text", text)
        assert "the hub doesn't give such a model: 404 for nobody/nothing" in outcome.mistake

    def test_debug_shows_the_traceback(self, lowbit: Lowbit) -> None:
        with pytest.raises(LowbitError):
            lowbit("inspect", "/no/such/folder", "--debug")


class TestOverwriting:
    """The old checkpoint stays until the new one is complete."""

    def test_replaces_a_checkpoint(self, lowbit: Lowbit, small: Path, tmp_path: Path) -> None:
        target = tmp_path / "model"
        assert lowbit("quantize", small, target, "--method", "nf4").status == 0
        assert lowbit("quantize", small, target, *RTN, "--overwrite").status == 0
        assert lowbit("inspect", target, "--json").json["format"] == "gptq"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_failure_while_saving_leaves_the_old_one_whole(
        self, lowbit: Lowbit, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "model"
        assert lowbit("quantize", small, target, "--method", "nf4").status == 0
        before = {path.name: path.read_bytes() for path in target.iterdir()}

        def fill_the_disk(self: Any, folder: Path, **_: Any) -> None:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device", "model.safetensors")

        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fill_the_disk)
        outcome = lowbit("quantize", small, target, *RTN, "--overwrite")
        assert outcome.status == 2
        assert "model.safetensors: No space left on device" in outcome.err
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_failure_while_saving_leaves_nothing_new(
        self, lowbit: Lowbit, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(self: Any, folder: Path, **_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupt)
        outcome = lowbit("quantize", small, tmp_path / "model", *RTN)
        assert outcome.status == 130
        assert outcome.err.endswith("lowbit: interrupted\n")
        assert list(tmp_path.iterdir()) == []
