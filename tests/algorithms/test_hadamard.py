"""Hadamard matrices and the rotations made of them: orthogonal, for every size, the same from the same seed."""

from __future__ import annotations

import pytest
import torch

from lowbit.algorithms.hadamard import Rotation, hadamard
from lowbit.errors import PlanError

# Powers of two; q + 1; 2 (q + 1) of a prime; of the square of one.
ORDERS = [1, 2, 4, 64, 12, 20, 24, 28, 44, 60, 108, 36, 76, 148, 52, 100]
# 12 and 20 times powers of two; a power of two; with a random factor: odd, and 172 = 4 * 43.
SIZES = [1536, 80, 256, 1, 7, 36, 45, 344, 4544]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_and_entries_are_one(order: int) -> None:
    matrix = hadamard(order)
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix[0], torch.ones(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 3, 6, 92, 172])
def test_orders_that_are_not_known_are_refused(order: int) -> None:
    with pytest.raises(PlanError, match=f"of order {order} is known"):
        hadamard(order)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", SIZES[:-1])
def test_rotations_are_orthogonal_and_are_what_they_apply(size: int, centred: bool) -> None:
    rotation = Rotation(size, seed=3, centred=centred)
    matrix = rotation.matrix()
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    inputs = torch.randn(5, size, dtype=torch.float64)
    assert torch.allclose(rotation.apply(inputs), inputs @ matrix, atol=1e-12)
    assert torch.allclose(rotation.undo(inputs), inputs @ matrix.t(), atol=1e-12)
    assert torch.allclose(rotation.apply(inputs.t(), axis=0), matrix.t() @ inputs.t(), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_in_fp32_a_rotation_undoes_itself_within_rounding(size: int) -> None:
    inputs = torch.randn(3, size)
    for centred in (False, True):
        rotation = Rotation(size, centred=centred)
        back = rotation.undo(rotation.apply(inputs))
        assert back.dtype == torch.float32
        assert (back - inputs).abs().max() < 2e-6 * inputs.abs().max()
        assert rotation.apply(inputs.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("size", SIZES[:-1])
def test_centred_rotations_keep_means(size: int) -> None:
    matrix, ones = Rotation(size, centred=True).matrix(), torch.ones(size, dtype=torch.float64)
    assert torch.allclose(ones @ matrix, ones, atol=1e-12)
    inputs = torch.randn(4, size, dtype=torch.float64)
    turned = torch.nn.functional.layer_norm(inputs @ matrix, [size])
    assert torch.allclose(turned, torch.nn.functional.layer_norm(inputs, [size]) @ matrix, atol=1e-9)


def test_an_outlier_is_spread_over_all_channels() -> None:
    outlier = torch.zeros(1536)
    outlier[17] = 100
    spread = Rotation(1536).apply(outlier)
    assert torch.allclose(spread.abs(), torch.full_like(spread, 100 / 1536**0.5), rtol=1e-4)
    # One that keeps means has entries like a normal distribution's.
    assert Rotation(1536, centred=True).apply(outlier).abs().max() < 100 * 6 / 1536**0.5
    assert Rotation(1536).known and not Rotation(344).known


def test_seeds_decide_the_rotation() -> None:
    inputs = torch.randn(4, 96)
    assert torch.equal(Rotation(96, 1).apply(inputs), Rotation(96, 1).apply(inputs))
    assert not torch.allclose(Rotation(96, 1).apply(inputs), Rotation(96, 2).apply(inputs))
    assert torch.equal(Rotation(45, 1).matrix(), Rotation(45, 1).matrix())


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(PlanError, match="positive size, not 0"):
        Rotation(0)
    with pytest.raises(PlanError, match="a rotation of 8 can't turn 9 channels"):
        Rotation(8).apply(torch.zeros(9))
