"""The Triton family for 4-bit weights: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU `test_in_the_interpreter` runs this file once
more in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.core import (
    Activation,
    Grouping,
    IntCode,
    QuantSpec,
    QuantTensor,
    Scale,
    SecondLevel,
    TableCode,
    Zero,
    pack,
    reference,
)
from lowbit.kernels import Problem, kernel_named, ops
from lowbit.kernels.triton import wna16
from lowbit.kernels.triton.wna16 import Config, Wna16Kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
KERNEL = Wna16Kernel()

runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs within test_in_the_interpreter")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

# (out, in, columns per group, permuted): tiles and groups that end early, groups of all classes, blocks half empty.
SHAPES = [
    (48, 256, 128, None),
    (33, 200, 64, None),
    (24, 320, 32, "even"),
    (24, 144, 24, None),
    (24, 208, 16, "even"),
    (17, 136, 8, "uneven"),
    (7, 65, 0, None),
    (32, 192, 0, "even"),
]
# Mean and standard deviation of ||y - r|| / ||r||, r from the reference in fp64, over SHAPES, batches 1 to 16 and 50
# seeds each, as `python tests/kernels/test_wna16.py` measures them; the larger of interpreter and H200.
MEASURED = {torch.float16: (2.4e-4, 5.0e-5), torch.bfloat16: (1.9e-3, 4.0e-4), torch.float32: (1.6e-7, 7.5e-8)}
TOLERANCE = {dtype: mean + 8 * sigma for dtype, (mean, sigma) in MEASURED.items()}

CONFIGS = [
    Config(slices=2, bands=1, fragments=1, steps=2, prefetch=False, registers=128),
    Config(slices=1, bands=2, fragments=2, steps=2, prefetch=True, registers=255),
    Config(slices=2, bands=2, fragments=1, steps=4, prefetch=False, registers=255),
]


def make(
    shape: tuple[int, int], group: int, permuted: str | None, *, scales: torch.dtype = torch.float16, seed: int = 0
) -> QuantTensor:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(IntCode(4), Scale(scales), Grouping(cols=group, permuted=permuted is not None), Zero("integer", 4))
    groups = spec.grouping.counts(shape)[1]
    tensors = {
        "codes": pack(torch.randint(0, 16, shape, generator=generator), 4),
        "scales": (torch.rand(shape[0], groups, generator=generator) * 0.01 + 0.005).to(scales),
        "zeros": pack(torch.randint(0, 16, (shape[0], groups), generator=generator), 4),
    }
    if permuted == "even":
        order = torch.randperm(shape[1], generator=generator)
        tensors["group_index"] = (torch.arange(shape[1]) // (group or shape[1]))[order].to(torch.int32)
    elif permuted == "uneven":
        tensors["group_index"] = torch.randint(0, groups, (shape[1],), generator=generator, dtype=torch.int32)
    return QuantTensor(spec, tensors, shape).validate().to(DEVICE)


def apply(tensor: QuantTensor, prepared: dict[str, Tensor], inputs: Tensor, bias: Tensor | None = None) -> Tensor:
    return KERNEL.apply(inputs, tensor.spec, tensor.shape, prepared, bias)


def relative_error(found: Tensor, tensor: QuantTensor, inputs: Tensor, bias: Tensor | None = None) -> float:
    wide = None if bias is None else bias.double()
    expected = reference.linear(inputs.double(), tensor.spec, tensor.tensors, tensor.shape, wide)
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A small cut of the program, in place of the table's."""
    chosen: Config = getattr(request, "param", CONFIGS[0])
    monkeypatch.setattr(wna16, "_configure", lambda device, rows, shape: chosen)
    wna16._cut.cache_clear()
    monkeypatch.setattr(wna16, "_cut", wna16._cut.__wrapped__)
    return chosen


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out_features", "in_features", "group", "permuted"), [*SHAPES, (1, 1, 0, None)])
def test_restore_is_the_inverse_of_prepare(
    out_features: int, in_features: int, group: int, permuted: str | None, scales: torch.dtype
) -> None:
    tensor = make((out_features, in_features), group, permuted, scales=scales)
    prepared = KERNEL.prepare(tensor)
    assert KERNEL.restore(tensor.spec, tensor.shape, prepared).equal(tensor)
    layout = KERNEL.layout(tensor.spec, tensor.shape)
    assert list(prepared) == list(layout)
    for name, (shape, dtype) in layout.items():
        assert prepared[name].dtype == dtype
        assert prepared[name].is_contiguous()
        if (name, permuted) != ("columns", "uneven"):
            assert tuple(prepared[name].shape) == shape


def test_uneven_groups_are_told_by_a_second_row() -> None:
    assert KERNEL.prepare(make((16, 64), 16, "even"))["columns"].shape == (1, 64)
    assert KERNEL.prepare(make((16, 64), 16, "uneven"))["columns"].shape == (2, 64)


@pytest.mark.parametrize("permuted", [None, "even"])
def test_bits_per_weight(permuted: str | None) -> None:
    prepared = KERNEL.prepare(make((256, 1024), 128, permuted))
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in prepared.values())
    assert 8 * bytes_ / (256 * 1024) <= (4.1875 if permuted is None else 4.3125)


@pytest.mark.parametrize("path", sorted(wna16._TABLES.glob("wna16_*.json")), ids=lambda path: path.stem)
def test_tables(path: Path) -> None:
    table = json.loads(path.read_text())
    for line in table["lines"]:
        config = Config(**line["config"])
        sides = (config.slices, config.bands, config.fragments, config.steps)
        assert all(side & (side - 1) == 0 < side for side in sides)
        assert config.steps % 2 == 0
        assert config.slices * config.bands * 32 * config.registers <= 65536
    assert not {"rows", "out", "in"} & set(table["lines"][-1])


# --- what it runs -----------------------------------------------------------------------------------------------------

GOOD = QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(128), Zero("integer", 4))


def _but(**changes: Any) -> QuantSpec:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grouping", [Grouping.groups(128), Grouping.per_channel(), Grouping.groups(40, permuted=True)])
def test_takes(grouping: Grouping, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "_machine_refusal", lambda: None)
    assert KERNEL.refusal(Problem(_but(grouping=grouping), (64, 240), "cuda", dtype)) is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_but(code=IntCode(4, signed=True)), "unsigned 4-bit"),
        (_but(code=IntCode(3)), "unsigned 4-bit"),
        (_but(code=TableCode("nf4"), zero=None), "unsigned 4-bit"),
        (_but(zero=None), "integer zero"),
        (_but(zero=Zero("float")), "integer zero"),
        (_but(zero=Zero("integer", 8)), "integer zero"),
        (_but(scale=Scale(torch.float16, second=SecondLevel("integer", 8))), "one level"),
        (_but(scale=Scale(torch.float16, multiplier=0.5)), "multiplier"),
        (_but(scale=Scale(torch.float64)), "scales"),
        (_but(grouping=Grouping.per_tensor()), "one row"),
        (_but(grouping=Grouping(rows=2, cols=16)), "one row"),
        (_but(grouping=Grouping.flat_blocks(64)), "one row"),
        (_but(grouping=Grouping.groups(20)), "multiple of 8"),
        (_but(activation=Activation("int8")), "activations"),
        (_but(rounding="each"), "rounds once"),
    ],
    ids=str,
)
def test_refuses(spec: QuantSpec, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "_machine_refusal", lambda: None)
    found = KERNEL.refusal(Problem(spec, (64, 256), "cuda", torch.float16))
    assert found is not None
    assert reason in found


def test_refuses_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert wna16._machine_refusal.__wrapped__() == "triton is not installed"


@pytest.mark.skipif(INTERPRETED, reason="runs outside")
def test_import_needs_no_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import lowbit.kernels.triton.wna16"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("out_features", "in_features", "group", "permuted"), SHAPES)
def test_dequantize_has_the_bits_of_the_reference(
    out_features: int, in_features: int, group: int, permuted: str | None, dtype: torch.dtype
) -> None:
    for scales in (torch.float16, torch.bfloat16, torch.float32) if group in (0, 64) or GPU else (torch.float16,):
        tensor = make((out_features, in_features), group, permuted, scales=scales)
        dense = KERNEL.dequantize(tensor.spec, tensor.shape, KERNEL.prepare(tensor), dtype)
        assert torch.equal(dense, tensor.dequantize(dtype))


@runs
@pytest.mark.parametrize(
    ("config", "rows", "dtype"),
    [
        (CONFIGS[0], 3, torch.float16),
        (CONFIGS[1], 16, torch.bfloat16),
        (CONFIGS[2], 1, torch.float16),
        (CONFIGS[2], 3, torch.float32),
    ],
    indirect=["config"],
    ids=str,
)
@pytest.mark.parametrize(("out_features", "in_features", "group", "permuted"), SHAPES)
def test_linear(
    config: Config, rows: int, out_features: int, in_features: int, group: int, permuted: str | None, dtype: torch.dtype
) -> None:
    tensor = make((out_features, in_features), group, permuted, scales=(torch.float16, torch.float32)[rows == 3])
    inputs = torch.randn(rows, in_features, device=DEVICE).to(dtype)
    bias = torch.randn(out_features, device=DEVICE).to(dtype) if rows == 3 else None
    outputs = apply(tensor, KERNEL.prepare(tensor), inputs, bias)
    assert outputs.dtype == dtype
    assert outputs.shape == (rows, out_features)
    assert relative_error(outputs, tensor, inputs, bias) < TOLERANCE[dtype]


@runs
@pytest.mark.parametrize("rows", [*range(1, 17), 17, 32, 33, 64, 65])
def test_batches(config: Config, rows: int) -> None:
    tensor = make((24, 128), 64, None)
    inputs = torch.randn(rows, 128, device=DEVICE).half()
    assert relative_error(apply(tensor, KERNEL.prepare(tensor), inputs), tensor, inputs) < TOLERANCE[torch.float16]


@runs
@pytest.mark.parametrize("shape", [(4096, 512), (16, 4096)])
@pytest.mark.parametrize("rows", [2, 16])
def test_with_the_table_as_it_is(shape: tuple[int, int], rows: int) -> None:
    if INTERPRETED and shape[0] > 16:
        pytest.skip("takes the interpreter minutes")
    tensor = make(shape, 128, None)
    inputs = torch.randn(rows, shape[1], device=DEVICE).half()
    assert relative_error(apply(tensor, KERNEL.prepare(tensor), inputs), tensor, inputs) < TOLERANCE[torch.float16]


@runs
@pytest.mark.parametrize(
    ("config", "permuted"),
    [(CONFIGS[0], None), (CONFIGS[1], "even"), (CONFIGS[2], None)],
    indirect=["config"],
    ids=str,
)
def test_touches_only_its_own(config: Config, permuted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN before and behind inputs and outputs, and in the padding of the weight."""
    tensor = make((40, 272), 16 if permuted else 0, permuted)
    prepared = KERNEL.prepare(tensor)
    prepared["scales"][-1, :, 1::2] = torch.nan  # rows 40 to 47, which don't exist
    guarded = torch.full((5 * 272 + 32,), torch.nan, device=DEVICE, dtype=torch.float16)
    inputs = guarded[16:-16].view(5, 272).normal_()
    allocated: list[Tensor] = []

    def poisoned(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        allocated.append(torch.full((5 * 40 + 64,), torch.nan, dtype=dtype, device=device))
        return allocated[-1][32:-32].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    outputs = apply(tensor, prepared, inputs)
    monkeypatch.undo()
    assert relative_error(outputs, tensor, inputs) < TOLERANCE[torch.float16]
    assert allocated[0][:32].isnan().all()
    assert allocated[0][-32:].isnan().all()


@runs
def test_shapes_of_inputs(config: Config) -> None:
    tensor = make((24, 128), 32, None)
    prepared = KERNEL.prepare(tensor)
    inputs = torch.randn(2, 3, 256, device=DEVICE).half()[..., ::2]
    assert not inputs.is_contiguous()
    outputs = apply(tensor, prepared, inputs)
    assert outputs.shape == (2, 3, 24)
    assert torch.equal(outputs.view(6, 24), apply(tensor, prepared, inputs.reshape(6, 128)))
    assert apply(tensor, prepared, inputs[:, :0]).shape == (2, 0, 24)
    shifted = torch.randn(129, device=DEVICE).half()[1:]  # not aligned to 16 bytes
    assert relative_error(apply(tensor, prepared, shifted), tensor, shifted) < TOLERANCE[torch.float16]


@runs
def test_one_order_of_summation(config: Config) -> None:
    tensor = make((48, 320), 64, None)
    prepared = KERNEL.prepare(tensor)
    inputs = torch.randn(4, 320, device=DEVICE).half()
    first = apply(tensor, prepared, inputs)
    assert all(torch.equal(apply(tensor, prepared, inputs), first) for _ in range(20 if GPU else 1))


@runs
def test_extreme_scales_stay_finite(config: Config) -> None:
    """Large inputs against small scales: the product of the codes alone would overflow fp16."""
    tensor = make((16, 256), 128, None)
    tensor.tensors["scales"].fill_(2.0**-20)
    inputs = torch.full((1, 256), 6e4, device=DEVICE, dtype=torch.float16)
    assert relative_error(apply(tensor, KERNEL.prepare(tensor), inputs), tensor, inputs) < TOLERANCE[torch.float16]


# --- on a GPU, with what surrounds it ---------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("permuted", [None, "even", "uneven"])
def test_a_layer_moves_there_and_back(permuted: str | None) -> None:
    from lowbit.nn.linear import QuantLinear

    tensor = make((96, 256), 64, permuted).to("cpu")
    layer = QuantLinear.from_tensor(tensor, bias=torch.nn.Parameter(torch.randn(96).half()))
    assert layer.kernel == "torch"
    layer = layer.cuda()
    assert layer.kernel == "triton-wna16"
    assert layer.quant_tensor().to("cpu").equal(tensor)
    inputs = torch.randn(3, 256).half()
    found = layer(inputs.cuda()).cpu()
    layer = layer.cpu()
    assert layer.kernel == "torch"
    assert layer.quant_tensor().equal(tensor)
    assert relative_error(found, tensor, inputs, layer.bias.detach()) < TOLERANCE[torch.float16]


def _arguments(rows: int, bias: bool = True) -> tuple[Any, ...]:
    tensor = make((96, 256), 64, None)
    inputs = torch.randn(rows, 256, device=DEVICE).half()
    added = torch.randn(96, device=DEVICE).half() if bias else None
    return inputs, list(KERNEL.prepare(tensor).values()), added, tensor.spec.to_json(), KERNEL.name, 96


@on_gpu
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_opcheck(rows: int) -> None:
    inputs, weight, bias, *rest = _arguments(rows)
    assert kernel_named(KERNEL.name).name == KERNEL.name
    torch.library.opcheck(torch.ops.lowbit.linear.default, (inputs.requires_grad_(), weight, bias, *rest))
    torch.library.opcheck(torch.ops.lowbit.dequantize.default, (weight, rest[0], KERNEL.name, 96, 256, torch.float16))


@on_gpu
def test_compiles_without_a_graph_break() -> None:
    arguments = _arguments(2)
    compiled = torch.compile(lambda inputs: torch.relu(ops.linear(inputs * 2, *arguments[1:])) + 1, fullgraph=True)
    expected = torch.relu(ops.linear(arguments[0] * 2, *arguments[1:])) + 1
    torch.testing.assert_close(compiled(arguments[0]), expected)


@on_gpu
def test_backward_goes_through_the_dense_weight() -> None:
    inputs, weight, _, spec, kernel, out_features = _arguments(5, bias=False)
    inputs.requires_grad_()
    outputs = ops.linear(inputs, weight, None, spec, kernel, out_features)
    outputs.backward(torch.ones_like(outputs))
    dense = ops.dequantize(weight, spec, kernel, out_features, 256, torch.float16)
    torch.testing.assert_close(inputs.grad, torch.ones_like(outputs) @ dense)


@on_gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_in_a_graph_after_anything(rows: int) -> None:
    """The program may be launched while the kernel before it runs; a fill, a copy, a fork before it still count."""
    arguments = _arguments(rows)
    fresh = [torch.randn_like(arguments[0]) for _ in range(4)]
    expected = [ops.linear(inputs, *arguments[1:]) for inputs in [torch.zeros_like(fresh[0]), *fresh]]
    static, side = torch.empty_like(fresh[0]), torch.cuda.Stream()
    host = fresh[1].cpu().pin_memory()
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        static.zero_()
        outputs.append(ops.linear(static, *arguments[1:]))
        static.copy_(fresh[0])
        outputs.append(ops.linear(static, *arguments[1:]))
        static.copy_(host, non_blocking=True)
        outputs.append(ops.linear(static, *arguments[1:]))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            static.copy_(fresh[2])
            outputs.append(ops.linear(static, *arguments[1:]))
        torch.cuda.current_stream().wait_stream(side)
        torch.add(fresh[3], 0, out=static)
        outputs.append(ops.linear(static, *arguments[1:]))
    for _ in range(20):
        static.fill_(torch.nan)
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(found, right) for found, right in zip(outputs, expected, strict=True))


@on_gpu
def test_a_chain_of_layers_equals_one_at_a_time() -> None:
    """Each output is the next input, launched back to back, so that a read before its write would show."""
    tensors = [make((512, 512), 128, None, seed=seed) for seed in range(8)]
    prepared = [KERNEL.prepare(tensor) for tensor in tensors]
    start = torch.randn(1, 512, device=DEVICE).half()
    slow = start
    for tensor, weight in zip(tensors, prepared, strict=True):
        slow = apply(tensor, weight, slow)
        torch.cuda.synchronize()
    for _ in range(50):
        fast = start
        for tensor, weight in zip(tensors, prepared, strict=True):
            fast = apply(tensor, weight, fast)
        assert torch.equal(fast, slow)


def measure(seeds: int = 50) -> None:
    """Print mean and standard deviation of the relative error, over all shapes, batches 1 to 16 and seeds."""
    for dtype in TOLERANCE:
        errors = []
        for seed, (out_features, in_features, group, permuted) in itertools.product(range(seeds), SHAPES):
            torch.manual_seed(seed)
            tensor = make((out_features, in_features), group, permuted, seed=seed)
            inputs = torch.randn(1 + seed % 16, in_features, device=DEVICE).to(dtype)
            errors.append(relative_error(apply(tensor, KERNEL.prepare(tensor), inputs), tensor, inputs))
        found = torch.tensor(errors, dtype=torch.float64)
        print(dtype, f"mean {found.mean():.3g}, sigma {found.std():.3g}, largest {found.max():.3g}")


if __name__ == "__main__":
    wna16._configure = lambda device, rows, shape: CONFIGS[0]
    measure()
