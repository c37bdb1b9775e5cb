"""The order in which GPTQ works off the columns of a weight, and the loop that does it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.algorithms.grid import Grid, Levels
from lowbit.core import Grouping

_GRAPHED_FROM = 8  # runs of fewer columns aren't worth a capture


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


@dataclass
class ColumnLoop:
    """Rounds a run of columns one after the other, each correcting those behind it within the run.

    On a GPU, a run's kernels are captured as a CUDA graph the first time that its shape comes up.
    """

    grid: Grid
    _graphs: dict[tuple[int, ...], _Graph] = field(default_factory=dict)

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
        if not weight.is_cuda or len(weight) < _GRAPHED_FROM:
            buffers = _Buffers.of(weight, upper, levels, before)
            buffers.work(self.grid)
            return buffers.codes, buffers.passed
        key = (*weight.shape, len(levels.step), int(before is None))
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.grid, _Buffers.of(weight, upper, levels, before))
        return self._graphs[key].run(weight, upper, levels, before)


@dataclass
class _Buffers:
    weight: Tensor
    upper: Tensor
    levels: Levels
    before: Tensor | None
    codes: Tensor
    passed: Tensor

    @classmethod
    def of(cls, weight: Tensor, upper: Tensor, levels: Levels, before: Tensor | None) -> _Buffers:
        """Copies, which may be written to."""
        kept = None if before is None else before.clone()
        made = torch.empty_like(weight), torch.empty_like(weight)
        return cls(weight.clone(), upper.clone(), levels.clone(), kept, *made)

    def load(self, weight: Tensor, upper: Tensor, levels: Levels, before: Tensor | None) -> None:
        self.weight.copy_(weight)
        self.upper.copy_(upper)
        self.levels.copy_(levels)
        if self.before is not None and before is not None:
            self.before.copy_(before)

    def first(self, count: int) -> _Buffers:
        levels = self.levels if len(self.levels.step) == 1 else self.levels.of(slice(0, count))
        before = None if self.before is None else self.before[:count]
        return _Buffers.of(self.weight[:count], self.upper[:count, :count], levels, before)

    def work(self, grid: Grid) -> None:
        last = len(self.weight) - 1
        alone = len(self.levels.step) == 1
        for column, weight in enumerate(self.weight.unbind(0)):
            meaning = self.levels.of(0 if alone else column)
            level = self.codes[column].copy_(grid.nearest(weight, meaning))
            value, passed = grid.value(level, meaning), self.passed[column]
            if self.before is None:
                torch.sub(weight, value, out=passed).div_(self.upper[column, column])
            else:
                torch.sub(value, self.before[column], out=passed)
            if column < last:
                self.weight[column + 1 :].addr_(self.upper[column, column + 1 :], passed, alpha=-1)


class _Graph:
    """The same work on buffers that stay where they are, captured once."""

    def __init__(self, grid: Grid, buffers: _Buffers) -> None:
        self.buffers = buffers
        current, stream = (torch.cuda.current_stream(buffers.weight.device), torch.cuda.Stream(buffers.weight.device))
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            buffers.first(2).work(grid)  # what is initialised at first use can't be while capturing
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            buffers.work(grid)

    def run(self, weight: Tensor, upper: Tensor, levels: Levels, before: Tensor | None) -> tuple[Tensor, Tensor]:
        self.buffers.load(weight, upper, levels, before)
        self.graph.replay()
        return self.buffers.codes, self.buffers.passed
