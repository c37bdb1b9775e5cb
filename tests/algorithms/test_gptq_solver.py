from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.algorithms.factor import factorize, full_precision
from lowbit.algorithms.gptq import Gptq, corrected
from lowbit.algorithms.grid import Grid, by_range, search, squared_error
from lowbit.algorithms.statistics import Collector, Statistics
from lowbit.core import Activation, Grouping, IntCode, QuantSpec, QuantTensor, Scale, TableCode, Zero, table_spec
from lowbit.errors import PlanError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SPECS = {
    "gptq": integer_spec(4, 16),
    "gptq, bf16": integer_spec(3, 16, scale_dtype=torch.bfloat16),
    "gptq, permuted": integer_spec(3, 16, permuted=True),
    "per channel": integer_spec(4, -1),
    "8 bits": integer_spec(8, 16),
    "compressed-tensors": QuantSpec(IntCode(4, True), Scale(torch.bfloat16), Grouping.groups(16), dtype=torch.bfloat16),
    "8 signed bits": QuantSpec(IntCode(8, True), Scale(torch.float32), Grouping.per_channel()),
    "hqq": QuantSpec(
        IntCode(2), Scale(torch.float16), Grouping.groups(16), Zero("float", dtype=torch.float16), rounding="each"
    ),
    "additive": QuantSpec(
        IntCode(4), Scale(torch.bfloat16), Grouping.groups(16), Zero("additive", dtype=torch.bfloat16)
    ),
    "signed additive": QuantSpec(
        IntCode(4, True), Scale(torch.bfloat16), Grouping.groups(16), Zero("additive", dtype=torch.bfloat16)
    ),
    "a multiplier": QuantSpec(IntCode(8, True), Scale(torch.float32, multiplier=1 / 127), Grouping.per_channel()),
    "nf4 in rows": QuantSpec(TableCode("nf4"), Scale(torch.float32), Grouping.groups(16)),
    "nf4 in blocks": table_spec("nf4", block_size=16),
    "fp4 in blocks": table_spec("fp4", block_size=8),
    "mxfp4": QuantSpec(TableCode("e2m1"), Scale(torch.float8_e8m0fnu), Grouping.groups(16), dtype=torch.bfloat16),
}
WAYS = {
    "paper": {"scale_search": "minmax"},
    "diagonal": {"scale_search": "diagonal", "sweeps": 0},
    "default": {},
    "trial": {"scale_search": "trial", "desc_act": True, "sweeps": 1},
    "static": {"static_groups": True, "desc_act": True},
    "symmetric": {"symmetric": True},
}


def statistics_of(size: int, tokens: int = 0, seed: int = 0) -> Statistics:
    """Of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens or 4 * size, size, generator=generator)
    inputs = (inputs + 0.7 * inputs.roll(1, 1)) * torch.rand(size, generator=generator).add(0.1)
    return Statistics(len(inputs), inputs.t() @ inputs / len(inputs))


def output_error(made: QuantTensor, weight: Tensor, statistics: Statistics) -> float:
    """Of the outputs' squares."""
    hessian = statistics.hessian
    assert hessian is not None
    error, weight = made.dequantize().double() - weight.double(), weight.double()
    return float((error @ hessian.double() * error).sum() / (weight @ hessian.double() * weight).sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_in_every_way(name: str, way: str) -> None:
    weight, statistics, spec = torch.randn(12, 48), statistics_of(48), SPECS[name]
    solver = Gptq(**WAYS[way])
    assert solver.supports(spec)
    made, report = solver.calibrated_with_report(weight, spec, statistics)
    assert made.spec == spec and made.shape == (12, 48)
    assert not report.fallback and report.attempts == 1 and report.damp == 0.01
    measured = output_error(made, weight, statistics)
    assert report.output_error == pytest.approx(measured, rel=1e-3)
    assert measured < {8: 1e-3, 4: 0.04, 3: 0.1, 2: 0.4}[spec.bits]


@given(
    bits=st.integers(2, 8),
    size=st.integers(1, 70),
    rows=st.integers(1, 5),
    cols=st.sampled_from([-1, 8, 16, 32]),
    symmetric=st.booleans(),
    desc_act=st.booleans(),
    search_=st.sampled_from(["diagonal", "conditional", "trial"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_never_worse_than_rounding_to_nearest(
    bits: int, size: int, rows: int, cols: int, symmetric: bool, desc_act: bool, search_: str, seed: int
) -> None:
    weight = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    statistics = statistics_of(size, tokens=3 + seed % 90, seed=seed)
    spec = integer_spec(bits, cols, scale_dtype=torch.float32)
    solver = Gptq(symmetric=symmetric, desc_act=desc_act, scale_search=search_, sweeps=seed % 2)
    made = solver.calibrated(weight, spec, statistics)
    plain = RoundToNearest(symmetric).quantize(weight, spec)
    # fp32 sums decide which is better; where both are exact, only their noise is left.
    assert output_error(made, weight, statistics) <= output_error(plain, weight, statistics) * (1 + 1e-4) + 1e-10


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("cols", [-1, 16, 20])
def test_inputs_without_correlation_give_rounding_to_nearest(bits: int, symmetric: bool, cols: int) -> None:
    weight, spec = torch.randn(9, 50), integer_spec(bits, cols)
    made = Gptq(symmetric=symmetric, scale_search="minmax").calibrated(weight, spec, Statistics(100, torch.eye(50)))
    assert made.equal(RoundToNearest(symmetric).quantize(weight, spec))


def test_the_first_pass_beats_rounding_with_the_same_scales() -> None:
    weight, statistics, spec = torch.randn(64, 96), statistics_of(96), integer_spec(3, 32)
    paper = Gptq(scale_search="minmax", static_groups=True).calibrated(weight, spec, statistics)
    plain = RoundToNearest().quantize(weight, spec)
    assert torch.equal(paper.tensors["scales"], plain.tensors["scales"])
    assert output_error(paper, weight, statistics) < 0.8 * output_error(plain, weight, statistics)


def test_each_ingredient_lowers_the_error() -> None:
    weight, statistics, spec = torch.randn(128, 256), statistics_of(256), integer_spec(3, 64)
    ways: list[dict[str, object]] = [
        {"scale_search": "minmax"},
        {"scale_search": "conditional", "sweeps": 0},
        {"scale_search": "conditional", "sweeps": 1},
        {"scale_search": "conditional", "sweeps": 3},
    ]
    errors = [output_error(Gptq(**way).calibrated(weight, spec, statistics), weight, statistics) for way in ways]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("spec", [integer_spec(3, 16, permuted=True), integer_spec(3, -1)], ids=str)
def test_with_desc_act_the_order_of_the_inputs_does_not_matter(spec: QuantSpec) -> None:
    weight, statistics, order = torch.randn(10, 48), statistics_of(48), torch.randperm(48)
    assert statistics.hessian is not None
    solver = Gptq(desc_act=True)
    straight = solver.calibrated(weight, spec, statistics).dequantize()
    shuffled = Statistics(statistics.tokens, statistics.hessian[order][:, order])
    assert torch.equal(solver.calibrated(weight[:, order], spec, shuffled).dequantize(), straight[:, order])


def test_desc_act_permutes_only_what_may_be_permuted() -> None:
    weight, statistics = torch.randn(6, 48), statistics_of(48)
    assert statistics.hessian is not None
    ranks = torch.argsort(torch.argsort(statistics.hessian.diagonal(), descending=True))
    permuted = integer_spec(4, 16, permuted=True)
    made = Gptq(desc_act=True).calibrated(weight, permuted, statistics)
    assert torch.equal(made.tensors["group_index"], (ranks // 16).int())
    for way in ({}, {"desc_act": True, "static_groups": True}):
        made = Gptq(**way).calibrated(weight, permuted, statistics)
        assert torch.equal(made.tensors["group_index"], torch.arange(48, dtype=torch.int32) // 16)
    plain = Gptq(desc_act=True).calibrated(weight, integer_spec(4, 16), statistics)
    assert "group_index" not in plain.tensors


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (7, 1), (3, 33), (5, 129), (2, 300)])
@pytest.mark.parametrize("cols", [-1, 32, 128])
def test_odd_shapes(shape: tuple[int, int], cols: int) -> None:
    weight, statistics, spec = torch.randn(shape), statistics_of(shape[1]), integer_spec(4, cols)
    made, report = Gptq().calibrated_with_report(weight, spec, statistics)
    assert made.shape == shape and report.output_error < 0.02


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_hessians_without_full_rank_are_damped(tokens: int, damp: float) -> None:
    weight, statistics = torch.randn(8, 64), statistics_of(64, tokens=tokens)
    made, report = Gptq(damp_percent=damp).calibrated_with_report(weight, integer_spec(4, 32), statistics)
    assert not report.fallback and report.output_error < 0.01
    assert torch.isfinite(made.dequantize()).all()
    assert any(f"{tokens} tokens" in note for note in report.notes)
    if not damp:
        assert report.damp > 0 and report.attempts > 1


def test_a_hessian_that_is_none_ends_in_rounding_and_says_so() -> None:
    weight, spec = torch.randn(8, 64), integer_spec(4, 32)
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 1e4
    made, report = Gptq().calibrated_with_report(weight, spec, Statistics(1000, indefinite))
    assert report.fallback and report.attempts == 4
    assert any("could not be factorized" in note and "rounded to nearest" in note for note in report.notes)
    assert report.weight_error < 0.01 and torch.isfinite(made.dequantize()).all()


@pytest.mark.parametrize("statistics", [Statistics(), Statistics(100, torch.zeros(64, 64))], ids=["dead", "silent"])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_without_inputs_is_rounded_with_searched_scales(statistics: Statistics, way: str) -> None:
    weight = torch.randn(8, 64) * torch.tensor([1.0, 4.0] * 32)
    spec = integer_spec(3, 32)
    made, report = Gptq(**WAYS[way]).calibrated_with_report(weight, spec, statistics)
    assert report.fallback and report.damp == 0 and len(report.notes) == 1
    assert report.output_error == pytest.approx(report.weight_error)
    plain = RoundToNearest(way == "symmetric").quantize(weight, spec).dequantize()
    squares = float((plain - weight).square().sum() / weight.square().sum())
    assert report.weight_error == pytest.approx(squares) if way == "paper" else report.weight_error < squares
    assert made.equal(Gptq(**WAYS[way]).quantize(weight, spec))


def test_inputs_that_are_always_zero() -> None:
    weight, inputs = torch.randn(8, 64), torch.randn(300, 64)
    inputs[:, 5:20] = 0
    statistics = Statistics(300, inputs.t() @ inputs / 300)
    made, report = Gptq().calibrated_with_report(weight, integer_spec(4, 32), statistics)
    # They keep their values, as nobody knows what other inputs will bring; the paper's algorithm sets them to 0.
    assert not report.fallback and (made.dequantize() - weight)[:, 5:20].square().mean() < 0.1 * weight.square().mean()
    paper = Gptq(scale_search="minmax").calibrated(weight, integer_spec(4, 32), statistics).dequantize()
    assert (paper[:, 5:20] == 0).all() and not (paper[:, 20:] == 0).all()


def test_weights_that_are_all_zero_stay_so() -> None:
    made, report = Gptq().calibrated_with_report(torch.zeros(4, 64), integer_spec(4, 32), statistics_of(64))
    assert (made.dequantize() == 0).all() and report.output_error == report.weight_error == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight, statistics, spec = torch.randn(8, 64), statistics_of(64), integer_spec(4, 32)
    broken = weight.clone()
    broken[2, 3] = bad
    with pytest.raises(PlanError, match="the weight holds NaN or infinite"):
        Gptq().calibrated(broken, spec, statistics)
    assert statistics.hessian is not None
    hessian = statistics.hessian.clone()
    hessian[1, 1] = bad
    with pytest.raises(PlanError, match="the hessian holds NaN or infinite"):
        Gptq().calibrated(weight, spec, Statistics(100, hessian))


def test_what_is_missing_or_misshapen_is_named() -> None:
    weight, statistics, spec = torch.randn(8, 64), statistics_of(64), integer_spec(4, 32)
    with pytest.raises(PlanError, match="needs the hessian"):
        Gptq().calibrated(weight, spec, Statistics(10))
    with pytest.raises(PlanError, match="needs the deviation"):
        Gptq(correction=True).calibrated(weight, spec, statistics)
    with pytest.raises(PlanError, match=r"is \[64, 64\], not \[32, 32\]"):
        Gptq().calibrated(weight, spec, statistics_of(32))
    with pytest.raises(PlanError, match="straddle the rows"):
        Gptq().calibrated(torch.randn(8, 40), table_spec("nf4", block_size=64), statistics_of(40))
    with pytest.raises(PlanError, match="share their inputs"):
        Gptq().calibrated_many([weight, torch.randn(8, 32)], [spec, spec], statistics)
    with pytest.raises(PlanError, match="more than its dtype holds"):
        Gptq().calibrated(weight * 1e8, spec, statistics)


@pytest.mark.parametrize(
    "arguments",
    [{"damp_percent": -0.1}, {"block_size": 0}, {"sweeps": -1}, {"correction_strength": 2}, {"scale_search": "best"}],
    ids=str,
)
def test_arguments_out_of_range(arguments: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="found"):
        Gptq(**arguments)


@pytest.mark.parametrize(
    "spec",
    [
        table_spec("nf4", nested=True),
        replace(integer_spec(4, 32), grouping=Grouping(8, 32)),
        replace(integer_spec(4, 32), grouping=Grouping.strided_groups(32)),
        replace(SPECS["compressed-tensors"], activation=Activation("static", scale_dtype=torch.float32)),
        QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(32)),
    ],
    ids=str,
)
def test_specs_that_it_does_not_make(spec: QuantSpec) -> None:
    assert not Gptq().supports(spec)
    with pytest.raises(PlanError, match="gptq makes"):
        Gptq().calibrated(torch.randn(32, 64), spec, statistics_of(64))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_weight_is_left_alone_and_the_same_bits_come_twice(dtype: torch.dtype) -> None:
    weight, statistics, spec = torch.randn(16, 64).to(dtype), statistics_of(64), integer_spec(3, 32)
    before, hessian = weight.clone(), statistics.hessian
    assert hessian is not None
    kept = hessian.clone()
    solver = Gptq(scale_search="trial", desc_act=True)
    first = solver.calibrated(weight, spec, statistics)
    assert first.equal(solver.calibrated(weight, spec, statistics))
    assert first.equal(Gptq(scale_search="trial", desc_act=True).calibrated(weight, spec, statistics))
    assert torch.equal(weight, before) and torch.equal(hessian, kept)


def test_weights_with_the_same_inputs_are_quantized_together_as_apart() -> None:
    weights = [torch.randn(rows, 64) for rows in (16, 8, 24)]
    specs, statistics = [integer_spec(3, 32), integer_spec(4, 16), integer_spec(3, 32)], statistics_of(64)
    together = Gptq().calibrated_many(weights, specs, statistics)
    for weight, spec, (made, report) in zip(weights, specs, together, strict=True):
        alone, said = Gptq().calibrated_with_report(weight, spec, statistics)
        assert made.spec == spec and report.output_error == pytest.approx(said.output_error, rel=1e-3)
        assert (made.dequantize() == alone.dequantize()).float().mean() > 0.99


def test_corrected_weights_bring_outputs_nearer_to_the_dense_ones() -> None:
    dense, noise = torch.randn(600, 48) @ torch.randn(48, 48) / 7, torch.randn(600, 48)
    inputs = 0.8 * dense + 0.3 * noise + 0.2 * dense.roll(1, 1)
    collector = Collector(frozenset({"hessian", "deviation"}))
    collector.add(inputs, dense)
    statistics = collector.finish()
    weight, spec = torch.randn(16, 48), integer_spec(4, 16)

    def distance(solver: Gptq) -> float:
        made = solver.calibrated(weight, spec, statistics).dequantize()
        return float((dense @ weight.t() - inputs @ made.t()).square().sum())

    errors = [distance(Gptq(correction=True, correction_strength=part)) for part in (0.0, 0.5, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == distance(Gptq()) and errors[2] < 0.8 * errors[0]
    assert Gptq(correction=True).needs == {"hessian", "deviation"} and Gptq().needs == {"hessian"}


def test_the_correction_is_the_least_squares_solution() -> None:
    dense, inputs, weight = torch.randn(200, 12), torch.randn(200, 12), torch.randn(5, 12)
    hessian, deviation = inputs.t() @ inputs / 200, (dense - inputs).t() @ inputs / 200
    order = torch.randperm(12)
    found = corrected(weight, deviation, order, factorize(hessian[order][:, order], 0.0), 1.0)
    wanted = torch.linalg.lstsq(inputs, dense @ weight.t()).solution.t()
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("condition", [1.0, 1e6, 1e12])
def test_the_factor_is_that_of_the_inverse(condition: float) -> None:
    basis = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    hessian = ((basis * torch.logspace(0, -1, 40, condition, dtype=torch.float64)) @ basis.t()).float()
    factor = factorize(hessian, 1e-4)
    damped = hessian.double() + 1e-4 * hessian.double().diagonal().mean() * torch.eye(40)
    product = factor.upper.double() @ damped @ factor.upper.double().t()
    assert torch.allclose(product, torch.eye(40, dtype=torch.float64), atol=1e-5)
    assert torch.equal(factor.upper, factor.upper.triu()) and factor.attempts == 1


@pytest.mark.parametrize("name", SPECS)
def test_a_search_never_ends_above_where_it_began(name: str) -> None:
    grid = Grid(SPECS[name], False, torch.device("cpu"))
    weight, importance = torch.randn(16, 300), torch.rand(16)
    plain = squared_error(grid, weight, importance, by_range(grid, weight))
    found = squared_error(grid, weight, importance, search(grid, weight, importance))
    assert (found <= plain).all() and found.sum() < 0.9 * plain.sum()


def test_the_precision_of_products_is_restored() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
