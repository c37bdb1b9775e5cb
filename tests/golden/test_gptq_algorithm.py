"""Our GPTQ against auto-gptq's: the same numbers with the same settings, smaller errors with searched scales."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apart import require, run
from lowbit.algorithms import integer_spec
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.statistics import Collector, Statistics
from lowbit.core import QuantTensor, reference

require("auto_gptq")

Tensors = dict[str, Tensor]
Case = dict[str, Any]
TOKENS = 2048
LINEARS = ("self_attn.q_proj", "self_attn.o_proj")
# Sums in another order round differently, and a code on the edge then falls to the other side, after which its row goes
# another way. On this data 7 of 80 cases have such a row, never more than 0.53 % of the weights of a case.
MOST_DIFFERENT = 0.01
FEWEST_EQUAL = 0.8


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    ways = [(False, False), (False, True), (True, False), (True, True)]
    for bits, size, symmetric, (desc_act, static) in itertools.product(
        (2, 3, 4, 8), (128, 64, -1), (True, False), ways
    ):
        if static and size == -1:
            continue  # its loop over groups has a step of -1
        # Where a block has two groups, auto-gptq chooses the second one's scale before the first one's corrections.
        case = {"bits": bits, "group_size": size, "symmetric": symmetric, "desc_act": desc_act, "static_groups": static}
        found["-".join(str(value) for value in case.values())] = case | {
            "layer": "made", "block_size": 64 if size == 64 else 128, "mse": False, "damp": 0.01,
        }  # fmt: skip
    return found


def originals(folder: Path, inputs: Tensors, wanted: dict[str, Case]) -> Tensors:
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "cases.json").write_text(json.dumps(wanted))
    run("original_gptq.py", folder)
    return load_file(folder / "outputs.safetensors")


@pytest.fixture(scope="module")
def made() -> Tensors:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator) / 16
    inputs = inputs * torch.rand(256, generator=generator).add(0.1)
    weight = torch.randn(96, 256, generator=generator) * 0.02
    return {"made/weight": weight, "made/hessian": inputs.t() @ inputs / 2000}


@pytest.fixture(scope="module")
def theirs(made: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return originals(tmp_path_factory.mktemp("gptq"), made, cases())


def quantize(case: Case, inputs: Tensors) -> QuantTensor:
    permuted = case["desc_act"] and not case["static_groups"] and case["group_size"] != -1
    spec = integer_spec(case["bits"], case["group_size"], permuted=permuted, scale_dtype=torch.float32)
    solver = Gptq(
        desc_act=case["desc_act"],
        static_groups=case["static_groups"],
        symmetric=case["symmetric"],
        scale_search="minmax",
    )
    return solver.calibrated(inputs["made/weight"], spec, Statistics(2000, inputs["made/hessian"]))


def compare(name: str, case: Case, ours: QuantTensor, theirs: Tensors) -> float:
    """Which part of the weights differs; all else is equal, or this fails."""
    dense = theirs[f"{name}/weight"]
    different = (ours.dequantize() - dense).abs() > 1e-5 * dense.abs().max()
    same = ~different.any(1)
    scales, wanted = ours.tensors["scales"], theirs[f"{name}/scales"]
    zeros = reference.decode_zeros(ours.spec, ours.tensors, ours.shape)
    assert zeros is not None and torch.equal(zeros.float()[same], theirs[f"{name}/zeros"][same])
    if case["static_groups"] or case["group_size"] == -1:
        assert torch.equal(scales, wanted)
    assert torch.allclose(scales[same], wanted[same], rtol=1e-5, atol=0)
    if ours.spec.grouping.permuted:
        assert torch.equal(ours.tensors["group_index"], theirs[f"{name}/group_index"])
    return float(different.float().mean())


def test_the_same_numbers_as_auto_gptq(made: Tensors, theirs: Tensors) -> None:
    different = {name: compare(name, case, quantize(case, made), theirs) for name, case in cases().items()}
    assert max(different.values()) <= MOST_DIFFERENT, different
    assert sum(part == 0 for part in different.values()) >= FEWEST_EQUAL * len(different), different


@pytest.fixture(scope="module")
def real(testbed: Path) -> Tensors:
    """Weights of a layer of a real model, and the Hessian of its inputs."""
    model = AutoModelForCausalLM.from_pretrained(testbed / "base", dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:3]
    text = (testbed / "calib.txt").read_text(encoding="utf-8")[: 8 * TOKENS]
    ids = AutoTokenizer.from_pretrained(testbed / "base")(text, add_special_tokens=False)["input_ids"][:TOKENS]
    layer, found = model.model.layers[2], {}
    collectors = {name: Collector(frozenset({"hessian"})) for name in LINEARS}
    for name, collector in collectors.items():
        layer.get_submodule(name).register_forward_pre_hook(lambda _, inputs, c=collector: c.add(inputs[0]))
    with torch.no_grad():
        model.model(torch.tensor(ids).view(-1, 1024))
    for name, collector in collectors.items():
        hessian = collector.finish().hessian
        assert hessian is not None and collector.tokens == TOKENS
        found |= {f"{name}/weight": layer.get_submodule(name).weight.detach().clone(), f"{name}/hessian": hessian}
    return found


def error_of(made: Tensor, inputs: Tensors, layer: str) -> float:
    weight, hessian = inputs[f"{layer}/weight"], inputs[f"{layer}/hessian"]
    difference = made - weight
    return float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())


def test_smaller_errors_than_auto_gptq_on_real_layers(real: Tensors, tmp_path: Path) -> None:
    wanted: dict[str, Case] = {}
    for layer, bits, symmetric, mse in itertools.product(LINEARS, (2, 3, 4), (True, False), (True, False)):
        wanted[f"{layer}-{bits}-{symmetric}-{mse}"] = {
            "layer": layer, "bits": bits, "group_size": 128, "symmetric": symmetric, "desc_act": False,
            "static_groups": False, "block_size": 128, "mse": mse, "damp": 0.01,
        }  # fmt: skip
    peers = originals(tmp_path, real, wanted)
    first_pass, swept = [], []
    for layer, bits, symmetric in itertools.product(LINEARS, (2, 3, 4), (True, False)):
        theirs = [error_of(peers[f"{layer}-{bits}-{symmetric}-{mse}/weight"], real, layer) for mse in (True, False)]
        statistics = Statistics(TOKENS, real[f"{layer}/hessian"])
        for sweeps, ratios in ((0, first_pass), (2, swept)):
            solver = Gptq(symmetric=symmetric, sweeps=sweeps)
            made = solver.calibrated(real[f"{layer}/weight"], integer_spec(bits, 128), statistics)
            ratios.append(error_of(made.dequantize(), real, layer) / min(theirs))
    # Ours are with scales in fp16, theirs in fp32. Without sweeps a single layer may come out a little worse than with
    # the original's `mse` (2 bits, symmetric), though not on the mean.
    assert max(swept) < 1 and math.prod(swept) < 0.9 ** len(swept), swept
    assert math.prod(first_pass) < 0.98 ** len(first_pass), first_pass
