"""Whole runs on tiny models of many architectures: what is seen, what is written, and what is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import decoders
import lowbit
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.statistics import HESSIAN, SQUARES, Statistics
from lowbit.calibration.data import load_calibration
from lowbit.core import Kept
from lowbit.errors import PlanError
from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun
from lowbit.wire.store import CheckpointFiles

IDS = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(1))
PLAIN = Gptq(symmetric=False, scale_search="minmax", sweeps=0)
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "granitemoe", "olmoe", "deepseek_v3"]


class Recording(Gptq):
    """GPTQ that remembers which statistics it was given for each matrix."""

    def __init__(self) -> None:
        super().__init__(symmetric=False, scale_search="minmax", sweeps=0)
        self.needs = frozenset({HESSIAN, SQUARES})
        self.given: list[tuple[list[Tensor], Statistics]] = []

    def calibrated_many(self, weights: Any, specs: Any, statistics: Statistics) -> Any:
        self.given.append(([weight.clone() for weight in weights], statistics))  # of a block that will change
        return super().calibrated_many(weights, specs, statistics)

    def of(self, weight: Tensor) -> Statistics:
        """What was given for this weight."""
        return next(
            statistics
            for weights, statistics in self.given
            if any(other.shape == weight.shape and torch.equal(other, weight) for other in weights)
        )


def gptq() -> Any:
    return lowbit.GPTQConfig(bits=4, group_size=32, sym=False)


def start(
    source: Path, folder: Path, algorithm: Gptq = PLAIN, data: Any = IDS, config: Any = None, **options: Any
) -> CalibratedRun:
    method = Calibrated(lambda name: algorithm, "gptq", **options)
    return CalibratedRun(source, config or gptq(), method, load_calibration(data, None), folder, torch.device("cpu"))


def finish(run: CalibratedRun, folder: Path) -> None:
    run.run()
    folder.mkdir()
    run.write(folder)
    run.close()


def arguments(kind: str, ids: Tensor = IDS) -> dict[str, Tensor]:
    return {"input_ids": ids, **({"decoder_input_ids": ids} if kind in decoders.ENCODERS else {})}


@torch.no_grad()
def logits(model: t.PreTrainedModel, kind: str) -> Tensor:
    return model(**arguments(kind)).logits


def put_weights(model: t.PreTrainedModel, run: CalibratedRun) -> None:
    """Make a dense model compute with what a run made."""
    results = run.results()
    with torch.no_grad():
        for unit in run.units:
            place = unit.weight(model.get_submodule(unit.module))
            place.copy_(results.unit(unit.name).dequantize(torch.float32))


@pytest.mark.parametrize("kind", decoders.MODELS)
def test_the_checkpoint_is_what_the_job_made(kind: str, tmp_path: Path) -> None:
    dense = decoders.save(kind, tmp_path / "dense")
    before = logits(dense, kind)
    run = start(tmp_path / "dense", tmp_path / "job")
    finish(run, tmp_path / "out")
    assert not run.notes

    layers = run.report()["layers"]
    assert [layer["name"] for layer in layers] == [unit.name for unit in run.units]
    assert all(layer["tokens"] > 0 for layer in layers)
    linear = [layer for layer, unit in zip(layers, run.units, strict=True) if unit.expert is None]
    assert {layer["tokens"] for layer in linear} == {IDS.numel()}

    made = decoders.auto(dense, lowbit).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert set(made.hf_quantizer.plan.quantized) == set(run.plan.quantized)
    put_weights(dense, run)
    expected = logits(dense, kind)
    torch.testing.assert_close(logits(made, kind), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 0


NAMED = ["llama", "mixtral", "qwen3_moe", "gpt_oss", "llama4", "granitemoe", "gpt2", "t5", "jamba", "qwen2_vl"]


@pytest.mark.parametrize("kind", NAMED)
def test_tensors_are_those_of_save_pretrained(kind: str, tmp_path: Path) -> None:
    dense = decoders.save(kind, tmp_path / "dense")
    run = start(tmp_path / "dense", tmp_path / "job")
    finish(run, tmp_path / "out")
    skipped = [name for name, kept in run.plan.kept.items() if kept.reason.startswith("not a part of")]
    config = lowbit.GPTQConfig(bits=4, group_size=32, sym=False, modules_to_not_convert=skipped or None)
    model = decoders.auto(dense, lowbit).from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(tmp_path / "saved")
    assert layout(tmp_path / "out") == layout(tmp_path / "saved")


def layout(folder: Path) -> dict[str, Any]:
    files = CheckpointFiles(folder)
    return {name: files.layout(name) for name in files.names()}


# ------------------------------------------------------------------------------------------------------ what is seen


def inputs_of(model: t.PreTrainedModel, kind: str, block: str) -> dict[str, list[Tensor]]:
    """The inputs of every linear layer of a block, by plain hooks."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def see(module: nn.Module, args: tuple[Tensor]) -> None:
            seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))

        handles.append(module.register_forward_pre_hook(see))

    for name, module in model.named_modules():
        if name.startswith(f"{block}.") and isinstance(module, nn.Linear | t.pytorch_utils.Conv1D):
            watch(name, module)
    with torch.no_grad():
        model(**arguments(kind), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", [kind for kind in decoders.MODELS if kind not in MIXTURES])
def test_statistics_are_those_of_plain_hooks(kind: str, tmp_path: Path) -> None:
    """In the first block of every stack those of the dense model, in the last those behind quantized blocks."""
    dense, recording = decoders.save(kind, tmp_path / "dense"), Recording()
    run = start(tmp_path / "dense", tmp_path / "job", recording, true_sequential=False)
    run.run()
    run.close()
    for stack in run.stacks:
        for block in (stack.blocks[0], stack.blocks[-1]):
            put_earlier_blocks(dense, run, block)
            seen = inputs_of(dense, kind, block)
            linear = [unit for unit in run.units if unit.module in seen]
            assert linear
            for unit in linear:
                check(recording, unit.weight(dense.get_submodule(unit.module)), seen[unit.module], IDS.numel())


def check(recording: Recording, weight: Tensor, seen: list[Tensor], tokens: int) -> None:
    """What was given for a weight is the mean over the rows that were seen."""
    rows, found = torch.cat(seen), recording.of(weight)
    assert found.tokens == len(rows) == tokens
    tolerance = 1e-4 * float(rows.square().mean())
    torch.testing.assert_close(found.hessian, rows.T @ rows / len(rows), rtol=1e-3, atol=tolerance)
    torch.testing.assert_close(found.squares, rows.square().mean(0), rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_later_layers_see_what_earlier_ones_became(kind: str, tmp_path: Path) -> None:
    dense, recording = decoders.save(kind, tmp_path / "dense"), Recording()
    run = start(tmp_path / "dense", tmp_path / "job", recording)
    run.run()
    run.close()
    block = run.stacks[0].blocks[0]
    order = list(inputs_of(dense, kind, block))
    units = sorted((unit for unit in run.units if unit.module in order), key=lambda unit: order.index(unit.module))
    first, last = units[0], units[-1]
    weight = last.weight(dense.get_submodule(last.module)).clone()
    check(recording, first.weight(dense.get_submodule(first.module)), inputs_of(dense, kind, block)[first.module], 128)
    results = run.results()
    with torch.no_grad():
        for unit in units[:-1]:
            made = results.unit(unit.name)
            unit.weight(dense.get_submodule(unit.module)).copy_(made.dequantize(made.spec.dtype))
    check(recording, weight, inputs_of(dense, kind, block)[last.module], 128)


def routed(model: t.PreTrainedModel, module: str) -> dict[int, Tensor]:
    """The rows that reach each expert, from the arguments of a dense model's experts."""
    experts, found = model.get_submodule(module), {}
    calls: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    (hidden, *chosen), count = calls[0], experts.down_proj.shape[0]
    for expert in range(count):
        if chosen:
            found[expert] = hidden[(chosen[0] == expert).any(-1)]
        else:
            rows = hidden.view(count, -1, hidden.shape[-1])[expert]
            found[expert] = rows[rows.abs().sum(-1) > 0]
    return found


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_see_the_tokens_that_are_routed_to_them(kind: str, tmp_path: Path) -> None:
    dense, recording = decoders.save(kind, tmp_path / "dense"), Recording()
    # With more samples than inputs for each expert, nothing is lent to any.
    ids = IDS.repeat(8, 1)
    run = start(tmp_path / "dense", tmp_path / "job", recording, ids, true_sequential=False, batch_tokens=64)
    run.run()
    run.close()
    unit = next(unit for unit in run.units if unit.expert is not None and unit.parameter == "gate_up_proj")
    put_earlier_blocks(dense, run, unit.module)
    rows = routed(dense, unit.module)
    layers = {layer["name"]: layer for layer in run.report()["layers"]}
    for other in run.units:
        if (other.module, other.parameter) == (unit.module, unit.parameter):
            mine = rows[other.expert]
            assert layers[other.name]["tokens"] == 8 * len(mine) > other.shape[1]
            found = recording.of(other.weight(dense.get_submodule(unit.module)))
            torch.testing.assert_close(found.hessian, mine.T @ mine / len(mine), rtol=1e-3, atol=1e-5)


def put_earlier_blocks(model: t.PreTrainedModel, run: CalibratedRun, module: str) -> None:
    """Quantize what runs before the block of `module`."""
    blocks = [name for stack in run.stacks for name in stack.blocks]
    block = next(name for name in blocks if f"{module}.".startswith(f"{name}."))
    earlier, results = blocks[: blocks.index(block)], run.results()
    with torch.no_grad():
        for unit in run.units:
            if any(unit.module.startswith(f"{name}.") for name in earlier):
                made = results.unit(unit.name)
                unit.weight(model.get_submodule(unit.module)).copy_(made.dequantize(made.spec.dtype))


@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_experts_that_no_token_reaches(kind: str, tmp_path: Path) -> None:
    dense = decoders.save(kind, tmp_path / "dense")
    run = start(tmp_path / "dense", tmp_path / "job", data=IDS[:1, :8])
    finish(run, tmp_path / "out")
    layers = {layer["name"]: layer for layer in run.report()["layers"]}
    few = [unit for unit in run.units if unit.expert is not None and layers[unit.name]["tokens"] < unit.shape[1]]
    assert few and any(layers[unit.name]["tokens"] == 0 for unit in few)
    assert all("lent to it" in " ".join(layers[unit.name]["notes"]) for unit in few)
    made = decoders.auto(dense, lowbit).from_pretrained(tmp_path / "out", dtype=torch.float32)
    put_weights(dense, run)
    torch.testing.assert_close(logits(made, kind), logits(dense, kind), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", ["llava", "gemma3_multimodal", "qwen2_vl", "qwen2_5_vl"])
def test_towers_that_text_does_not_reach_stay_dense(kind: str, tmp_path: Path) -> None:
    dense = decoders.save(kind, tmp_path / "dense")
    run = start(tmp_path / "dense", tmp_path / "job")
    run.close()
    assert all(name.startswith("model.language_model.layers.") for name in run.plan.quantized)
    tower = {name: run.plan.kept[name] for name in run.plan.kept if "vision" in name or "visual.blocks" in name}
    linear = [name for name, module in dense.named_modules() if name in tower and isinstance(module, nn.Linear)]
    assert linear
    reasons = {tower[name].reason for name in linear if ".0." in name and ".head." not in name}
    assert reasons == {"not a part of model.language_model, and so not reached by text"}
    assert all(isinstance(kept, Kept) for kept in tower.values())


def compressed(target: str) -> Any:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": [target], "weights": weights}}
    return lowbit.CompressedTensorsConfig(config_groups=groups, format="pack-quantized")


def test_linear_layers_outside_of_blocks_stay_dense(tmp_path: Path) -> None:
    decoders.save("llava", tmp_path / "dense")
    run = start(tmp_path / "dense", tmp_path / "job", config=compressed("Linear"))
    finish(run, tmp_path / "out")
    kept = {name: kept.reason for name, kept in run.plan.kept.items()}
    assert kept["lm_head"] == "output head"
    projector = {name for name in kept if "multi_modal_projector" in name}
    assert {kept[name] for name in projector} == {"not a part of model.language_model, and so not reached by text"}
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", *projector} <= set(ignored)


def test_nothing_to_calibrate(tmp_path: Path) -> None:
    decoders.save("llava", tmp_path / "dense")
    with pytest.raises(PlanError, match="nothing that is calibrated would be quantized"):
        start(tmp_path / "dense", tmp_path / "job", config=compressed("re:.*multi_modal_projector.*"))
