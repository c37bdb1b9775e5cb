"""Block by block: what is refused, what is left out, batches of any shape, and keeping activations anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import decoders
import lowbit
from lowbit.algorithms.gptq import Gptq
from lowbit.calibration.capture import Capture
from lowbit.calibration.data import load_calibration
from lowbit.calibration.stacks import Stack, block_lists
from lowbit.calibration.tune import TuneConfig
from lowbit.errors import PlanError
from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun

IDS = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(1))
PLAIN = Gptq(symmetric=False, scale_search="minmax", sweeps=0)


def quantize(kind: str, folder: Path, data: Any = IDS, algorithm: Gptq = PLAIN, **options: Any) -> CalibratedRun:
    """A finished run on the model in ``folder/kind``, which is made if need be."""
    if not (folder / kind).exists():
        decoders.save(kind, folder / kind)
    config = lowbit.GPTQConfig(bits=4, group_size=32, sym=False)
    method = Calibrated(lambda name: algorithm, "gptq", **options)
    job = folder / f"job-{len(list(folder.iterdir()))}"
    run = CalibratedRun(folder / kind, config, method, load_calibration(data, None), job, torch.device("cpu"))
    try:
        run.run()
    finally:
        run.close()
    return run


def same(one: CalibratedRun, other: CalibratedRun) -> bool:
    first, second = one.results(), other.results()
    return all(first.unit(unit.name).equal(second.unit(unit.name)) for unit in one.units)


def tokens(run: CalibratedRun) -> dict[str, int]:
    return {layer["name"]: layer["tokens"] for layer in run.report()["layers"]}


# ------------------------------------------------------------------------------------------------------- the batches


def test_samples_of_any_length_are_seen_whole(tmp_path: Path) -> None:
    samples = [IDS[number % 4, : 5 + 3 * number] for number in range(6)]
    total = sum(map(len, samples))
    runs = [quantize("mixtral", tmp_path, samples, batch_tokens=size) for size in (1, 40, 10_000)]
    for run in runs:
        counts = tokens(run)
        linear = {unit.name for unit in run.units if unit.expert is None}
        assert {counts[name] for name in linear} == {total}
        for part in ("gate_proj", "down_proj"):
            chosen = [counts[unit.name] for unit in run.units if "layers.0" in unit.name and unit.part == part]
            assert sum(chosen) == 2 * total  # two experts for each token
    firsts = [[run.results().unit(name) for name in list(linear)[:3]] for run in runs]
    assert all(len(entries) == 3 for entries in firsts)


@pytest.mark.parametrize("sequential", [True, False])
def test_batches_differ_by_rounding_alone(sequential: bool, tmp_path: Path) -> None:
    one = quantize("llama", tmp_path, batch_tokens=32, true_sequential=sequential)
    other = quantize("llama", tmp_path, batch_tokens=128, true_sequential=sequential)
    first = [unit for unit in one.units if "layers.0" in unit.name]
    differing = 0.0
    for unit in first:
        left, right = one.results().unit(unit.name).dequantize(), other.results().unit(unit.name).dequantize()
        differing += float((left != right).float().mean()) / len(first)
    assert differing < 0.02  # a code at the edge between two
    assert tokens(one) == tokens(other)


def test_activations_in_files_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = quantize("t5", tmp_path, tune=TuneConfig(steps=2))
    monkeypatch.setattr("lowbit.calibration.flow.choose_place", lambda *args: "disk")
    filed = quantize("t5", tmp_path, tune=TuneConfig(steps=2))
    assert same(held, filed)
    assert not (filed.folder / "activations").exists()


def test_sequential_or_not_differs_behind_the_first_stage(tmp_path: Path) -> None:
    one, other = (quantize("llama", tmp_path, true_sequential=sequential) for sequential in (True, False))
    block = "model.layers.0."
    equal = {
        unit.name.removeprefix(block): one.results().unit(unit.name).equal(other.results().unit(unit.name))
        for unit in one.units
        if unit.name.startswith(block)
    }
    assert equal["self_attn.q_proj"] and equal["self_attn.k_proj"] and equal["self_attn.v_proj"]
    assert not equal["mlp.down_proj"]


# -------------------------------------------------------------------------------------------------- learning and state


def test_blocks_that_share_keys_keep_those_of_the_dense_model_apart(tmp_path: Path) -> None:
    """The error behind each block, measured in a second run of the blocks beside the quantized ones."""
    run = quantize("gemma4", tmp_path, algorithm=Gptq(symmetric=False, sweeps=0, correction=True))
    dense = t.Gemma4ForCausalLM.from_pretrained(tmp_path / "gemma4").eval()
    results = run.results()
    expected = [hidden.detach() for hidden in hidden_states(dense)]
    with torch.no_grad():
        for unit in run.units:
            made = results.unit(unit.name)
            unit.weight(dense.get_submodule(unit.module)).copy_(made.dequantize(made.spec.dtype))
    for mine, theirs, block in zip(hidden_states(dense), expected, run.report()["blocks"], strict=True):
        error = float((mine - theirs).square().sum() / theirs.square().sum())
        assert block["output_error"] == pytest.approx(error, rel=1e-3)


def hidden_states(model: t.PreTrainedModel) -> list[Tensor]:
    """Behind every block."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


# ------------------------------------------------------------------------------------------------------ what is refused


def test_models_that_read_no_text(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
    t.BertForMaskedLM(t.BertConfig(intermediate_size=96, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(PlanError, match="no text model for 'BertForMaskedLM'"):
        quantize("bert", tmp_path)


class Block(nn.Module):
    """Returns the hidden states alone, or something beside them too."""

    def __init__(self, beside: str = "") -> None:
        super().__init__()
        self.linear, self.beside = nn.Linear(4, 4), beside

    def forward(self, hidden: Tensor, other: Tensor | None = None) -> Any:
        out = self.linear(hidden)
        if not self.beside:
            return out
        return out, (out.sum(-1) if self.beside == "result" else torch.arange(hidden.shape[1]))


class Model(nn.Module):
    """Three blocks that run one after the other, or nearly so."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(Block(how if how in ("result", "constant") else "") for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden, other = torch.nn.functional.one_hot(input_ids, 4).float(), None
        order = {
            "twice": [0, 1, 1, 2],
            "backwards": [1, 0, 2],
            "loops": [0, 1, 2, 0, 1, 2],
            "skips": [0, 2],
            "none": [],
        }.get(self.how, [0, 1, 2])
        if self.how == "images":
            raise ValueError("pixel_values are missing")
        for number in order:
            hidden = self.layers[number](hidden, other)
            if isinstance(hidden, tuple):
                hidden, other = hidden
            if self.how == "between":
                hidden = hidden * 2
        return hidden


def capture(how: str, required: list[str] | None = None) -> tuple[Model, Capture, dict[int, Tensor]]:
    model, kept = Model(how), {}
    first = model.layers[0]
    stack = Stack("layers", ("layers.0", "layers.1", "layers.2"))
    found = Capture(model, stack, lambda args, kwargs: first(*args, **kwargs), (), required)
    found.run({0: {"input_ids": torch.tensor([[0, 1, 2]])}}, kept.__setitem__)
    return model, found, kept


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("between", "the model changes what 'layers.0' hands to 'layers.1'"),
        ("twice", "the model runs 'layers.1' behind 'layers.1'"),
        ("backwards", "the model runs 'layers.1' before 'layers.0'"),
        ("loops", "the model runs 'layers.0' behind 'layers.2'"),
        ("skips", "the model doesn't run layers.1 on the calibration data"),
        ("none", "the model doesn't run layers.0, layers.1, layers.2 on"),
        ("result", "'layers.1' is given more of what 'layers.0' computed than hidden states"),
        ("images", "Model can't be calibrated on input_ids alone: pixel_values are missing"),
    ],
)
def test_forwards_that_are_not_block_by_block(how: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        capture(how)


@pytest.mark.parametrize("how", ["", "constant", "skips"])
@torch.no_grad()
def test_blocks_one_by_one_compute_what_the_model_does(how: str) -> None:
    model, found, kept = capture(how, ["layers.0", "layers.2"])
    hidden = kept[0]
    for number, block in enumerate(model.layers):
        hidden = found.captured.call(block, number, 0, hidden)
    assert torch.equal(hidden, model(torch.tensor([[0, 1, 2]]), use_cache=False))
    assert [type(block) for block in model.layers] == [Block] * 3  # nothing stands in for them any more


def test_lists_of_bare_linear_layers_are_no_stacks() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), Model())
    assert block_lists(model) == ["1.layers"]
