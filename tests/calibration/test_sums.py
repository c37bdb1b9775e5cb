"""Statistics of a whole run: sums along one tree, and what is lent to experts that saw little."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowbit.algorithms import integer_spec
from lowbit.algorithms.statistics import HESSIAN, MAGNITUDES, SQUARES, Collector, Statistics
from lowbit.calibration.distributed import LEAVES, TreeSum
from lowbit.calibration.statistics import Key, Leaf, combine, input_groups, widen, without_deviation
from lowbit.calibration.units import Unit

CPU = torch.device("cpu")
NEEDS = frozenset({HESSIAN, SQUARES})


def tree(values: list[Tensor | None]) -> Tensor | None:
    """Halves of halves; what is missing leaves the other half as it is."""
    if len(values) == 1:
        return values[0]
    left, right = tree(values[: len(values) // 2]), tree(values[len(values) // 2 :])
    return right if left is None else left if right is None else left + right


def test_sums_follow_one_tree_whatever_is_missing() -> None:
    values = [torch.randn(50) * 10**number for number in range(LEAVES)]
    in_a_row = 0
    for present in itertools.product([False, True], repeat=LEAVES):
        given = [value if there else None for value, there in zip(values, present, strict=True)]
        sums = TreeSum()
        for value in given:
            sums.push(None if value is None else value.clone())
        total, expected = sums.total(), tree(given)
        if expected is None:
            assert total is None
            continue
        assert total is not None and torch.equal(total, expected)
        in_a_row += torch.equal(expected, sum(value for value in given if value is not None))
    assert in_a_row < 200  # the order matters to these numbers


def test_a_tree_holds_one_sum_per_level() -> None:
    sums = TreeSum()
    for number in range(LEAVES):
        sums.push(torch.ones(1))
        assert len(sums._levels) == (number + 1).bit_count()


def leaves(inputs: dict[int, Tensor], key: Key = "linear") -> Iterator[tuple[int, Leaf]]:
    for number, rows in inputs.items():
        leaf = Leaf(NEEDS)
        leaf.add(key, rows)
        yield number, leaf


@pytest.mark.parametrize("present", [range(LEAVES), [0], [7], [2, 3, 6]], ids=str)
def test_runs_are_combined_to_means(present: list[int]) -> None:
    inputs = {number: torch.randn(3 + number, 4) for number in present}
    found = combine(leaves(inputs), ["linear", "unseen"], NEEDS, CPU)
    rows = torch.cat(list(inputs.values()))
    assert found["linear"].tokens == len(rows) and found["unseen"] == Statistics(0)
    torch.testing.assert_close(found["linear"].hessian, rows.t() @ rows / len(rows), rtol=1e-5, atol=1e-6)
    by_run = [inputs[number].square().sum(0) if number in inputs else None for number in range(LEAVES)]
    expected = tree(by_run)
    assert expected is not None and found["linear"].squares is not None
    assert torch.equal(found["linear"].squares, expected / len(rows))


def test_runs_are_made_one_at_a_time() -> None:
    alive: list[int] = []

    def made() -> Iterator[tuple[int, Leaf]]:
        for number, leaf in leaves({number: torch.randn(2, 4) for number in range(LEAVES)}):
            alive.append(number)
            yield number, leaf
            assert "hessian" not in leaf.collectors["linear"].sums  # given away before the next is made

    combine(made(), ["linear"], NEEDS, CPU)
    assert alive == list(range(LEAVES))


def measured(tokens: int, scale: float = 1.0) -> tuple[Statistics, Tensor]:
    rows = scale * torch.randn(tokens, 6)
    collector = Collector(frozenset({HESSIAN, SQUARES, MAGNITUDES}))
    if tokens:
        collector.add(rows)
    return collector.finish(), rows


def test_experts_that_saw_little_are_lent_what_all_saw() -> None:
    keys = [("experts", "gate_up_proj", number) for number in range(3)]
    own, rows = zip(*(measured(tokens, scale) for tokens, scale in ((40, 1.0), (2, 3.0), (0, 1.0))), strict=True)
    given = dict(zip(keys, own, strict=True))
    found = widen(given, dict.fromkeys(keys, 6))
    pool = torch.cat(rows)
    mean = pool.t() @ pool / 42
    assert found[keys[0]] == (own[0], None)
    few, note = found[keys[1]]
    assert few.tokens == 6 and note is not None and note.startswith("the expert saw 2 tokens: 4 ")
    torch.testing.assert_close(few.hessian, (rows[1].t() @ rows[1] + 4 * mean) / 6, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few.squares, few.hessian.diagonal(), rtol=1e-5, atol=1e-5)
    none, note = found[keys[2]]
    assert none.tokens == 6 and note is not None and note.startswith("the expert saw 0 tokens: 6 ")
    torch.testing.assert_close(none.hessian, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(none.magnitudes, pool.abs().mean(0), rtol=1e-5, atol=1e-5)
    assert all(value is given[key] for key, value in zip(keys, own, strict=True))


def test_nothing_is_lent_across_layers_or_to_linear_layers() -> None:
    mine, other = ("a", "down_proj", 0), ("b", "down_proj", 0)
    given: dict[Key, Statistics] = {mine: Statistics(0), other: measured(20)[0], "linear 0 of 6": measured(2)[0]}
    found = widen(given, dict.fromkeys(given, 6))
    assert all(found[key] == (given[key], None) for key in given)


def test_a_deviation_of_zero_for_experts() -> None:
    plain = measured(10)[0]
    assert plain.hessian is not None
    found = without_deviation(plain)
    assert found.deviation is not None and torch.equal(found.deviation, torch.zeros(6, 6))
    assert found.hessian is plain.hessian
    kept = Statistics(10, hessian=plain.hessian, deviation=plain.hessian)
    assert without_deviation(kept) is kept and without_deviation(Statistics(0)) == Statistics(0)


def unit(name: str, cols: int, expert: int | None = None) -> Unit:
    module = "experts" if expert is not None else name
    return Unit(
        name, module, "gate_up_proj" if expert is not None else "weight", (8, cols), integer_spec(4, 16), expert
    )


def test_units_with_the_same_inputs_are_grouped() -> None:
    stages = [
        [unit("q", 16), unit("k", 16), unit("odd", 32)],
        [unit("o", 16)],
        [unit("experts.0.gate_proj", 16, 0), unit("experts.1.gate_proj", 16, 1), unit("experts.0.up_proj", 16, 0)],
    ]
    names = [[one.name for one in group] for group in input_groups(stages).values()]
    experts = [["experts.0.gate_proj", "experts.0.up_proj"], ["experts.1.gate_proj"]]
    assert names == [["q", "k"], ["odd"], ["o"], *experts]
