"""``--method best`` as a whole, on a tiny model: widths, GPTQ, learning, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

import decoders
import lowbit
from lowbit.calibration.data import Calibration, load_calibration
from lowbit.calibration.memory import free_memory
from lowbit.calibration.tune import TuneConfig, divergence
from lowbit.core import QuantTensor
from lowbit.errors import PlanError
from lowbit.integrations.transformers import best, calibrate
from lowbit.integrations.transformers.calibrate import CalibratedRun

CPU = torch.device("cpu")
LEARNING = TuneConfig(epochs=12, batch=4, rate=2e-2, scale_rate=5e-3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "initializer_range": 0.1}
    folder = tmp_path_factory.mktemp("best") / "dense"
    t.LlamaForCausalLM(t.LlamaConfig(**decoders.GROUPED | sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data() -> Calibration:
    tokens = torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(0))
    return load_calibration(tokens, None)


@pytest.fixture(scope="module")
def choice(dense: Path, data: Calibration) -> best.Choice:
    return best.choose(dense, data, 3.3, CPU, form="gptq", learning=LEARNING)


def quantize(dense: Path, data: Calibration, choice: best.Choice, folder: Path) -> Any:
    run = CalibratedRun(dense, choice.config, choice.method, data, folder / "job", CPU)
    try:
        run.run()
        (folder / "out").mkdir()
        run.write(folder / "out")
    finally:
        run.close()
    return lowbit.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)


def test_widths_differ_and_what_is_stored_is_what_was_asked_for(
    dense: Path, data: Calibration, choice: best.Choice, tmp_path: Path
) -> None:
    assert 3.1 < choice.bits <= 3.3 and choice.divergence is not None and choice.divergence > 0
    without = replace(choice, method=replace(choice.method, distill=None))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    learned, plain = (quantize(dense, data, one, tmp_path / own) for own, one in (("a", choice), ("b", without)))
    for folder in (tmp_path / "a" / "out", tmp_path / "b" / "out"):
        assert stored_bits(folder) == pytest.approx(choice.bits)
    teacher = t.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tokens = torch.stack(data.samples)
    with torch.no_grad():
        expected = teacher(input_ids=tokens).logits
        distances = [float(divergence(expected, model(input_ids=tokens).logits)) for model in (learned, plain)]
    assert distances[0] < 0.9 * distances[1] < 0.9 * choice.divergence


def stored_bits(folder: Path) -> float:
    """Per quantized weight, of all that the files hold of it; the layers have several widths."""
    weights = lowbit.open_checkpoint(folder).weights
    assert len({weight.spec for weight in weights.values()}) > 1
    stored = load_file(folder / "model.safetensors")
    held = [tensor for name, tensor in stored.items() if name.rpartition(".")[0] in weights]
    return 8 * sum(tensor.nbytes for tensor in held) / sum(rows * cols for rows, cols in shapes(weights))


def shapes(weights: Mapping[str, QuantTensor]) -> list[tuple[int, int]]:
    return [weight.shape for weight in weights.values()]


def test_the_same_data_give_the_same_widths(dense: Path, data: Calibration, choice: best.Choice) -> None:
    again = best.choose(dense, data, 3.3, CPU, form="gptq", learning=LEARNING)
    assert again.config.to_dict() == choice.config.to_dict() and again.divergence == choice.divergence


def test_too_few_bits(dense: Path, data: Calibration) -> None:
    with pytest.raises(PlanError, match="gptq: 2 bits per weight are not enough: .* the least is 2"):
        best.choose(dense, data, 2.0, CPU, form="gptq")


def test_formats_of_one_width(dense: Path, data: Calibration) -> None:
    with pytest.raises(PlanError, match="best writes gptq or compressed-tensors, not awq"):
        best.choose(dense, data, 4.0, CPU, form="awq")


def test_models_that_do_not_fit(dense: Path, data: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best, "free_memory", lambda device: 1 << 20)
    with pytest.raises(PlanError, match=r"measuring sensitivities takes .* use --method gptq with --bits"):
        best.choose(dense, data, 4.0, CPU, form="gptq")


def test_learning_that_does_not_fit_is_refused_before_any_block(
    dense: Path, data: Calibration, choice: best.Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "free_memory", lambda device: 1 << 20)
    told: list[object] = []
    run = CalibratedRun(dense, choice.config, choice.method, data, tmp_path / "job", CPU)
    try:
        with pytest.raises(PlanError, match=r"learning against the dense model takes .* or use a larger device"):
            run.run(lambda done, description=None: told.append(done))
    finally:
        run.close()
    assert told == [] and not list((tmp_path / "job").glob("blocks/*.json"))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux says how much memory its caches would give back")
def test_memory_that_caches_files_counts_as_free() -> None:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    amounts = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    assert free_memory(CPU) == pytest.approx(amounts["MemAvailable"], rel=0.2)
    assert free_memory(CPU) <= amounts["MemTotal"]
