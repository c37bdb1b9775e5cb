"""Statistics of inputs: the means they are said to be, however the inputs come in pieces."""

from __future__ import annotations

import pytest
import torch

from lowbit.algorithms.statistics import DEVIATION, HESSIAN, MAGNITUDES, SQUARES, Collector, Statistics

ALL = frozenset({HESSIAN, DEVIATION, SQUARES, MAGNITUDES})


def test_they_are_means_over_tokens() -> None:
    inputs, dense = torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    collector = Collector(ALL)
    collector.add(inputs, dense)
    found = collector.finish()
    x, other = inputs.reshape(60, 8).double(), dense.reshape(60, 8).double()
    assert found.tokens == 60
    expected = {
        HESSIAN: x.t() @ x / 60,
        DEVIATION: sum(torch.outer(b - a, a) for a, b in zip(x, other, strict=True)) / 60,
        SQUARES: (x**2).mean(0),
        MAGNITUDES: x.abs().mean(0),
    }
    for name, value in expected.items():
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_of_any_shape_add_up(dtype: torch.dtype) -> None:
    inputs, dense = torch.randn(60, 8).to(dtype), torch.randn(60, 8).to(dtype)
    whole, pieces = Collector(ALL), Collector(ALL)
    whole.add(inputs, dense)
    pieces.add(inputs[:1], dense[:1])
    pieces.add(inputs[1:1], dense[1:1])
    pieces.add(inputs[1:25].reshape(2, 3, 4, 8), dense[1:25].reshape(2, 3, 4, 8))
    pieces.add(inputs[25:].unsqueeze(0), dense[25:].unsqueeze(0))
    a, b = whole.finish(), pieces.finish()
    assert a.tokens == b.tokens == 60
    for name in ALL:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ALL))
def test_only_what_is_asked_for_is_gathered(name: str) -> None:
    collector = Collector(frozenset({name}))
    collector.add(torch.randn(5, 4), torch.randn(5, 4))
    found = collector.finish()
    assert {own for own in ALL if getattr(found, own) is not None} == {name}


def test_inputs_are_left_alone_and_not_kept() -> None:
    inputs = torch.randn(5, 4, requires_grad=True)
    before = inputs.detach().clone()
    collector = Collector(ALL)
    for _ in range(2):
        collector.add(inputs, inputs + 1)
    assert torch.equal(inputs.detach(), before)
    assert all(not total.requires_grad for total in collector.sums.values())


def test_no_deviation_without_the_dense_model() -> None:
    collector = Collector(frozenset({HESSIAN, DEVIATION}))
    collector.add(torch.randn(5, 4))
    assert collector.finish().deviation is None


def test_no_tokens() -> None:
    assert Collector(ALL).finish() == Statistics(0)
    collector = Collector(ALL)
    collector.add(torch.zeros(0, 4), torch.zeros(0, 4))
    found = collector.finish()
    assert found.tokens == 0 and found.hessian is not None and torch.equal(found.hessian, torch.zeros(4, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_no_numbers(bad: float) -> None:
    collector = Collector(frozenset({HESSIAN}))
    collector.add(torch.ones(3, 4))
    inputs = torch.ones(3, 4)
    inputs[1, 2] = bad
    with pytest.raises(FloatingPointError, match="the inputs of a layer are NaN or infinite"):
        collector.add(inputs)
    assert collector.tokens == 3  # what is refused is not counted


def test_large_inputs_are_no_infinite_ones() -> None:
    """Whose sum is infinite in fp32, while each of them is not."""
    collector = Collector(frozenset({MAGNITUDES}))
    collector.add(torch.full((2, 3), 1.5e38))
    assert collector.tokens == 2


def test_importance_is_the_mean_square() -> None:
    inputs = torch.randn(50, 6)
    by_squares, by_hessian = Collector(frozenset({SQUARES})), Collector(frozenset({HESSIAN}))
    for collector in (by_squares, by_hessian):
        collector.add(inputs)
    found = [collector.finish().importance() for collector in (by_squares, by_hessian)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert Statistics(5, magnitudes=torch.ones(6)).importance() is None


def test_products_are_made_in_fp32_whatever_was_set_before() -> None:
    """bf16 products, which a user may have allowed, would have errors of a percent."""
    inputs = 1 + 0.003 * torch.randn(64, 32)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        collector = Collector(frozenset({HESSIAN}))
        collector.add(inputs)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    exact = inputs.double().t() @ inputs.double() / 64
    hessian = collector.finish().hessian
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), exact, rtol=1e-6, atol=0)
