"""The order in which GPTQ works off the columns of a weight, and the loop that does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.grid import Grid, Levels
from lowbit.algorithms.replay import Replayed
from lowbit.core import Grouping


@dataclass(frozen=True)
class ColumnOrder:
    """In which order columns are worked off, and which groups they are in.

    Attributes:
        order: ``int64 [in]``, the column that comes first, second, ...
        group: ``int64 [in]``, the group of each column, in the weight's own order.
        static: whether groups may lie in pieces in that order, so that their scales must be known before.
        count: of groups.
    """

    order: Tensor
    group: Tensor
    static: bool
    count: int

    @classmethod
    def of(cls, grouping: Grouping, importance: Tensor, *, desc_act: bool, static: bool) -> ColumnOrder:
        """By falling `importance` ``[in]`` where `desc_act`; else from the first to the last.

        A permuted grouping makes groups of columns in that order. One that isn't keeps its groups: with `static`
        scales the order goes over all of them, else whole groups are ordered by their mean, and columns within them.
        """
        size = len(importance)
        cols = grouping.cols or size
        plain = torch.arange(size, device=importance.device)
        group, order, count = plain // cols, plain, -(-size // cols)
        if desc_act:
            order = torch.argsort(importance, descending=True, stable=True)
            if grouping.permuted and not static:
                group = torch.empty_like(plain).index_copy_(0, order, plain // cols)
            elif not static:
                order = _by_groups(order, group, importance, count)
        return cls(order, group, static, count)

    def columns(self) -> list[Tensor]:
        """Of each group, where its columns stand in the order, ascending."""
        in_order = self.group[self.order]
        sizes = torch.bincount(in_order, minlength=self.count).tolist()
        return list(torch.argsort(in_order, stable=True).split(sizes))

    def runs(self, longest: int) -> list[tuple[int, int]]:
        """Where to cut the ordered columns: at the ends of groups, unless static, and after `longest` columns."""
        in_order = self.group[self.order].tolist()
        runs, start = [], 0
        for end in range(1, len(in_order) + 1):
            complete = end == len(in_order) or (not self.static and in_order[end] != in_order[start])
            if complete or end - start == longest:
                runs.append((start, end))
                start = end
        return runs


def _by_groups(order: Tensor, group: Tensor, importance: Tensor, count: int) -> Tensor:
    sizes = torch.bincount(group, minlength=count)
    means = torch.stack([part.mean() for part in importance.split(sizes.tolist())])
    rank = torch.argsort(torch.argsort(means, descending=True, stable=True), stable=True)
    return order[torch.argsort(rank[group[order]], stable=True)]


class ColumnLoop:
    """Rounds a run of columns one after the other, each correcting those behind it within the run."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._first = Replayed(self._pass_errors, _two_columns)
        self._again = Replayed(self._pass_changes, _two_columns)

    def run(self, weight: Tensor, upper: Tensor, levels: Levels, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Work off ``fp32 [n, rows]``, which is left alone.

        Args:
            weight: what each column should become.
            upper: ``[n, n]``; what is said of column i goes to those behind it along ``upper[i]``.
            levels: ``[n, rows]``, or ``[1, rows]`` where all columns are in one group.
            before: None in GPTQ, where a column's error over ``upper[i, i]`` is passed on; else what each column was,
                and the change is passed on (coordinate descent).

        Returns:
            Levels, and what was passed on, both ``fp32 [n, rows]``, valid until the next call.
        """
        meaning = (levels.step, levels.shift, levels.low, levels.high)
        if before is None:
            codes, passed = self._first(weight, upper, *meaning)
        else:
            codes, passed = self._again(weight, upper, *meaning, before)
        return codes, passed

    def _pass_errors(self, weight: Tensor, upper: Tensor, *meaning: Tensor) -> tuple[Tensor, ...]:
        return self._work(weight, upper, Levels(*meaning), None)

    def _pass_changes(self, weight: Tensor, upper: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return self._work(weight, upper, Levels(*more[:4]), more[4])

    def _work(self, weight: Tensor, upper: Tensor, levels: Levels, before: Tensor | None) -> tuple[Tensor, ...]:
        grid, weight = self.grid, weight.clone()
        codes, passed = torch.empty_like(weight), torch.empty_like(weight)
        alone = len(levels.step) == 1
        for column in range(len(weight)):
            meaning, row = levels.of(0 if alone else column), weight[column]
            level = codes[column].copy_(grid.nearest(row, meaning))
            if before is None:
                torch.sub(row, grid.value(level, meaning), out=passed[column]).div_(upper[column, column])
            else:
                torch.sub(grid.value(level, meaning), before[column], out=passed[column])
            if column + 1 < len(weight):
                weight[column + 1 :].addr_(upper[column, column + 1 :], passed[column], alpha=-1)
        return codes, passed


def _two_columns(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight, upper, *others = inputs
    return (weight[:2], upper[:2, :2], *(other[:2] for other in others))
