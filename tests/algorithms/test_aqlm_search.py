"""AQLM's additive quantization: what it makes, how good it is, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.algorithms.aqlm import AdditiveQuantization, decode
from lowbit.algorithms.aqlm.fit import fitted_codebooks, fitted_scales
from lowbit.algorithms.aqlm.search import revised_codes, sequential_codes
from lowbit.algorithms.aqlm.start import nearest, residual_kmeans
from lowbit.algorithms.aqlm.tiles import IndexedSum, blocks_of, from_tiles, row_errors, sum_vectors, to_tiles
from lowbit.algorithms.statistics import Collector, Statistics
from lowbit.core import Grouping, QuantSpec, Scale, VectorCode
from lowbit.errors import PlanError
from lowbit.wire.aqlm import AqlmWire

QUICK = {"beam": 2, "epochs": 2, "iterations": 4}


def vector_spec(
    codebooks: int, bits: int, in_group: int = 8, out_group: int = 1, dtype: torch.dtype = torch.float16
) -> QuantSpec:
    code = VectorCode(codebooks, bits, out_group, in_group)
    return QuantSpec(code, Scale(dtype), Grouping(out_group, 0), dtype=dtype, rounding="each")


def correlated(tokens: int, size: int) -> Statistics:
    """Statistics of inputs of which few directions carry most."""
    inputs = torch.randn(tokens, size) @ torch.randn(size, size) * torch.logspace(0, -1.5, size)
    collector = Collector(frozenset({"hessian"}))
    collector.add(inputs)
    return collector.finish()


def relative_error(weight: Tensor, made: Tensor, hessian: Tensor) -> float:
    return float(row_errors(weight - made, hessian).sum() / row_errors(weight, hessian).sum())


# ------------------------------------------------------------------------------------------------------ the whole


def test_vectors_of_twelve_bits_for_eight_weights_beat_integers_of_two_bits() -> None:
    weight, statistics = torch.randn(128, 256), correlated(512, 256)
    hessian = statistics.hessian
    assert hessian is not None
    plain = RoundToNearest().quantize(weight, integer_spec(2, 64)).dequantize()
    spec, method = vector_spec(2, 6), AdditiveQuantization(**QUICK)  # indices of 6 bits, stored in 8
    blind, seeing = method.quantize(weight, spec), method.calibrated(weight, spec, statistics)
    assert blind.bits_per_weight == 2 * 8 / 8 + 16 / 256 + 16 * 2 * 64 * 8 / weight.numel()
    identity = torch.eye(256)
    assert relative_error(weight, blind.dequantize(), identity) < relative_error(weight, plain, identity)
    errors = [relative_error(weight, made, hessian) for made in (seeing.dequantize(), blind.dequantize(), plain)]
    assert errors[0] < 0.5 * errors[1] and errors[0] < 0.4 * errors[2]


@pytest.mark.parametrize(
    ("codebooks", "bits", "in_group", "out_group"),
    [
        (1, 8, 8, 1),
        (2, 8, 8, 1),
        (8, 8, 32, 1),
        (4, 8, 16, 1),
        (1, 10, 8, 1),
        (1, 12, 16, 1),
        (3, 5, 4, 2),
        (2, 1, 8, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_shape_of_codebooks_is_made_and_written(
    codebooks: int, bits: int, in_group: int, out_group: int, dtype: torch.dtype
) -> None:
    weight, spec = torch.randn(32, 64, dtype=dtype), vector_spec(codebooks, bits, in_group, out_group, dtype)
    before = weight.clone()
    made = AdditiveQuantization(beam=2, epochs=1, iterations=2).calibrated(weight, spec, correlated(128, 64))
    assert torch.equal(weight, before)
    assert made.spec == spec and made.shape == (32, 64)
    wire = AqlmWire()
    settings = wire.settings_for(spec)
    assert wire.read(settings, wire.write(settings, made)).equal(made)
    codes, size = made.tensors["codes"].long(), 1 << bits
    assert int(codes.min()) >= -(size // 2) and int(codes.max()) < size - size // 2


def test_sixteen_bit_codes_are_exact_where_there_are_fewer_tiles_than_vectors() -> None:
    weight = torch.randn(64, 128, dtype=torch.float16)
    made = AdditiveQuantization().quantize(weight, vector_spec(1, 16))
    error = relative_error(weight.float(), made.dequantize(), torch.eye(128))
    assert error < 1e-6  # of fp16


def test_more_codebooks_beams_and_turns_are_better() -> None:
    weight, statistics = torch.randn(64, 128), correlated(256, 128)
    assert statistics.hessian is not None

    def error(codebooks: int, **arguments: Any) -> float:
        made = AdditiveQuantization(**QUICK | arguments).calibrated(weight, vector_spec(codebooks, 5), statistics)
        return relative_error(weight, made.dequantize(), statistics.hessian)

    by_codebooks = [error(count) for count in (1, 2, 3)]
    assert by_codebooks[0] > 1.3 * by_codebooks[1] > 1.69 * by_codebooks[2]
    assert error(2, epochs=0) > error(2, epochs=1) > error(2, epochs=6, tolerance=0.0)
    assert error(2, beam=1) > error(2, beam=6)


def test_the_same_seed_gives_the_same_bits_and_another_gives_others() -> None:
    weight, statistics, spec = torch.randn(64, 64), correlated(128, 64), vector_spec(2, 6)
    first, second, other = (
        AdditiveQuantization(**QUICK, seed=seed).calibrated(weight, spec, statistics) for seed in (3, 3, 4)
    )
    assert first.equal(second) and not first.equal(other)


def test_rows_do_not_depend_on_how_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics, spec = torch.randn(48, 64), correlated(128, 64), vector_spec(2, 5, 8, 2)
    whole = AdditiveQuantization(**QUICK).calibrated(weight, spec, statistics).dequantize()
    monkeypatch.setattr("lowbit.algorithms.aqlm.search._CPU_NUMBERS", 1000)
    monkeypatch.setattr("lowbit.algorithms.aqlm.start._CPU_NUMBERS", 1000)
    parts = AdditiveQuantization(**QUICK).calibrated(weight, spec, statistics).dequantize()
    assert statistics.hessian is not None
    errors = [relative_error(weight, made, statistics.hessian) for made in (whole, parts)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)  # sums over fewer rows round otherwise


# ------------------------------------------------------------------------------------------------ unusual inputs


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.randn(32, 64)
    weight[[0, 7, 31]] = 0
    made = AdditiveQuantization(**QUICK).quantize(weight, vector_spec(2, 5)).dequantize()
    assert relative_error(weight, made, torch.eye(64)) < 0.3
    assert torch.equal(made[[0, 7, 31]], torch.zeros(3, 64))
    for spec in (vector_spec(2, 8), vector_spec(1, 2)):
        nothing = AdditiveQuantization(**QUICK).quantize(torch.zeros(16, 32), spec).dequantize()
        assert torch.equal(nothing, torch.zeros(16, 32))


def test_dead_and_dependent_inputs() -> None:
    inputs = torch.randn(20, 64)  # fewer tokens than inputs: the Hessian is singular
    inputs[:, [3, 9, 40]] = 0
    collector = Collector(frozenset({"hessian"}))
    collector.add(inputs)
    statistics = collector.finish()
    weight = torch.randn(32, 64)
    assert statistics.hessian is not None
    for damping in (0.01, 0.0):
        method = AdditiveQuantization(**QUICK, damping=damping)
        made = method.calibrated(weight, vector_spec(2, 6), statistics).dequantize()
        assert bool(torch.isfinite(made).all())
        blind = method.quantize(weight, vector_spec(2, 6)).dequantize()
        errors = [relative_error(weight, one, statistics.hessian) for one in (made, blind)]
        assert errors[0] < 0.6 * errors[1]


def test_inputs_that_are_always_zero_or_never_came_say_nothing() -> None:
    weight, spec, method = torch.randn(16, 32), vector_spec(1, 4), AdditiveQuantization(**QUICK)
    plain = method.quantize(weight, spec)
    assert method.calibrated(weight, spec, Statistics(5, hessian=torch.zeros(32, 32))).equal(plain)
    assert method.calibrated(weight, spec, Statistics()).equal(plain)
    assert method.calibrated(weight, spec, Statistics(9, hessian=torch.eye(32) * 7)).equal(plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    weight, hessian, spec = torch.randn(16, 32), torch.eye(32), vector_spec(1, 4)
    hessian[3, 4] = value
    with pytest.raises(PlanError, match="Hessian holds NaN or infinite"):
        AdditiveQuantization().calibrated(weight, spec, Statistics(1, hessian=hessian))
    weight[2, 5] = value
    with pytest.raises(PlanError, match="weight holds NaN or infinite"):
        AdditiveQuantization().quantize(weight, spec)


def test_what_else_is_refused() -> None:
    weight, method = torch.randn(16, 32), AdditiveQuantization(**QUICK)
    with pytest.raises(PlanError, match="tiles of 1 x 12 don't divide a weight of 16 x 32"):
        method.quantize(weight, vector_spec(1, 4, 12))
    with pytest.raises(PlanError, match="tiles of 3 x 8 don't divide"):
        method.quantize(weight, vector_spec(1, 4, 8, 3))
    with pytest.raises(PlanError, match="Hessian of 32 inputs is 32 x 32, not 16 x 16"):
        method.calibrated(weight, vector_spec(1, 4), Statistics(1, hessian=torch.eye(16)))
    with pytest.raises(PlanError, match="not positive definite"):
        method.calibrated(weight, vector_spec(1, 4), Statistics(1, hessian=torch.eye(32) - torch.ones(32, 32) * 0.9))
    with pytest.raises(PlanError, match=r"a scale of 1\.\d*e\+06 is more than torch.float16 holds"):
        method.quantize(weight * 1e6, vector_spec(1, 4))
    with pytest.raises(PlanError, match="sums of vectors with one scale per row"):
        method.quantize(weight, integer_spec(4, 32))
    assert not method.supports(integer_spec(4, 32))
    for wrong in ({"beam": 0}, {"epochs": -1}, {"tolerance": -0.1}, {"damping": float("nan")}):
        with pytest.raises(PlanError, match=f"aqlm: {next(iter(wrong))} is"):
            AdditiveQuantization(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the steps


def test_decode_is_the_reference_and_lets_gradients_through() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        made = AdditiveQuantization(**QUICK).quantize(torch.randn(16, 64), vector_spec(3, 8, 8, 2, dtype))
        parts = made.tensors
        again = decode(parts["codes"], parts["codebooks"], parts["scales"], made.shape)
        assert torch.equal(again, made.dequantize(dtype))
    codebooks = parts["codebooks"].double().requires_grad_()
    scales = parts["scales"].double().requires_grad_()
    decode(parts["codes"], codebooks, scales, (16, 64)).square().sum().backward()
    # d/ds of the sum of (s v)² is 2 s v² in each row of tiles.
    dense = made.dequantize().double().view(8, -1).square().sum(1)
    assert torch.allclose(scales.grad.view(-1), 2 * dense / scales.detach().view(-1))  # type: ignore[union-attr]
    assert codebooks.grad is not None and int(codebooks.grad.count_nonzero()) > 0


def test_tiles_and_back() -> None:
    weight = torch.arange(6 * 8.0).view(6, 8)
    tiles = to_tiles(weight, 2, 4)
    assert tiles.shape == (3, 2, 8)
    assert tiles[1, 1].tolist() == [20, 21, 22, 23, 28, 29, 30, 31]
    assert torch.equal(from_tiles(tiles, 2, 4), weight)
    assert torch.equal(blocks_of(torch.arange(16.0).view(4, 4), 2)[1], torch.tensor([[10.0, 11.0], [14.0, 15.0]]))


def test_sums_by_index() -> None:
    index, rows = torch.randint(0, 5, (3000,)), torch.randn(3000, 3, dtype=torch.float64)
    index[index == 3] = 1  # an index without rows, and one with many
    wanted = torch.zeros(6, 3, dtype=torch.float64).index_add_(0, index, rows)
    summed = IndexedSum(index, 6)
    assert torch.allclose(summed(rows), wanted)
    table, places, weights = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 7, (3000,)), rows[:, 0]
    wanted = torch.zeros(6, 3, dtype=torch.float64).index_add_(0, index, weights.unsqueeze(1) * table[places])
    assert torch.allclose(summed.of_table(table, places, weights), wanted)


def test_kmeans_leaves_no_vector_unused() -> None:
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = torch.cat([places[:1].expand(190, 2), places.repeat(3, 1)])  # most vectors start at the same place
    codes, books = residual_kmeans(points, torch.ones(202), 1, 4, 10, seed=0)
    assert codes.shape == (202, 1) and books.shape == (1, 4, 2)
    assert torch.equal(books[0][codes[:, 0]], points)
    assert torch.equal(nearest(points, books[0]), codes[:, 0])


def test_weights_of_points_pull_vectors() -> None:
    points, weights = torch.tensor([[0.0], [1.0]]).repeat(20, 1), torch.tensor([1.0, 3.0]).repeat(20)
    _, books = residual_kmeans(points, weights, 1, 1, 3, seed=0)
    assert float(books) == pytest.approx(0.75)


def problem(codebooks: int, out_group: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, a Hessian, its factor and codebooks of four vectors."""
    weight, inputs = torch.randn(4, 6), torch.randn(40, 6) @ torch.randn(6, 6)
    hessian = inputs.t() @ inputs / 40 + 0.01 * torch.eye(6)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    assert torch.allclose(factor @ factor.t(), hessian, atol=1e-5)
    return weight, hessian, factor, torch.randn(codebooks, 4, out_group, 2)


def errors_of(codes: Tensor, weight: Tensor, hessian: Tensor, codebooks: Tensor) -> Tensor:
    made = decode(codes, codebooks, torch.ones(len(codes)), (4, 6))
    return row_errors(weight - made, hessian).view(len(codes), -1).sum(1)


@pytest.mark.parametrize("out_group", [1, 2])
def test_a_beam_that_keeps_everything_finds_the_best_codes(out_group: int) -> None:
    weight, hessian, factor, books = problem(1, out_group)
    rows = 4 // out_group
    choices = torch.tensor(list(itertools.product(range(4), repeat=3))).view(-1, 1, 3, 1).expand(-1, rows, -1, -1)
    every = torch.stack([errors_of(choice, weight, hessian, books) for choice in choices])
    wide = errors_of(sequential_codes(weight, factor, books, beam=64), weight, hessian, books)
    assert torch.allclose(wide, every.amin(0), rtol=1e-4)
    narrow = errors_of(sequential_codes(weight, factor, books, beam=1), weight, hessian, books)
    assert bool((narrow >= wide * 0.9999).all()) and bool((narrow < every.median(0).values).all())


def test_more_beginnings_of_rows_find_better_codes_of_several_codebooks() -> None:
    weight, statistics, books = torch.randn(64, 64), correlated(128, 64), torch.randn(2, 16, 1, 4) * 0.7
    hessian = statistics.hessian
    assert hessian is not None
    hessian = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(64)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    errors = []
    for beam in (1, 4, 16):
        made = decode(sequential_codes(weight, factor, books, beam), books, torch.ones(64), (64, 64))
        errors.append(float(row_errors(weight - made, hessian).sum()))
    assert errors[0] > 1.05 * errors[1] > 1.1 * errors[2]


@pytest.mark.parametrize(("codebooks", "out_group"), [(1, 1), (3, 1), (2, 2)])
def test_revised_codes_are_never_worse_and_cannot_be_bettered_in_one_tile(codebooks: int, out_group: int) -> None:
    weight, hessian, _, books = problem(codebooks, out_group)
    codes = torch.randint(0, 4, (4 // out_group, 3, codebooks))
    errors = errors_of(codes, weight, hessian, books)
    for _ in range(12):
        codes, before = revised_codes(weight, hessian, books, codes, beam=4**codebooks), errors
        errors = errors_of(codes, weight, hessian, books)
        assert bool((errors <= before * 1.0001).all())
    for group, *choice in itertools.product(range(3), *[range(4)] * codebooks):
        other = codes.clone()
        other[:, group] = torch.tensor(choice)
        assert bool((errors_of(other, weight, hessian, books) >= errors * 0.9999).all())


def test_codebooks_and_scales_are_fitted_by_least_squares() -> None:
    torch.manual_seed(1)
    weight, hessian, _, books = (part.double() for part in problem(2))
    codes, scales = torch.randint(0, 4, (4, 3, 2)), torch.rand(4, dtype=torch.float64) + 0.5
    fitted = fitted_codebooks(weight, hessian, codes, books, scales, steps=60)

    def error(codebooks: Tensor) -> Tensor:
        return row_errors(weight - decode(codes, codebooks, scales, (4, 6)), hessian).sum()

    gradient = torch.autograd.functional.jacobian(error, fitted)
    assert float(gradient.abs().max()) < 1e-6 * float(torch.autograd.functional.jacobian(error, books).abs().max())
    assert float(error(fitted)) < float(error(books))
    best = fitted_scales(weight, hessian, codes, fitted, scales)
    for factor in (0.99, 1.01):
        other = row_errors(weight - decode(codes, fitted, best * factor, (4, 6)), hessian)
        assert bool((other > row_errors(weight - decode(codes, fitted, best, (4, 6)), hessian)).all())
    silent = fitted_scales(weight, hessian, codes, torch.zeros_like(fitted), scales)
    assert torch.equal(silent, scales)


def test_sums_of_vectors_take_stored_codes_and_unsigned_ones() -> None:
    books = torch.randn(2, 256, 1, 8)
    codes = torch.randint(0, 256, (3, 5, 2))
    assert torch.equal(sum_vectors(codes, books), sum_vectors(codes.to(torch.uint8).view(torch.int8), books))
