"""GPTQ (arXiv:2210.17323) with searched scales, GPTAQ's correction (arXiv:2504.02692), and refinement by descent.

The error of a layer's outputs, ``tr((W - Q) H (W - Q)ᵀ)`` with ``H`` the mean of ``x xᵀ``, is lowered column by column:
each column is rounded, and what that did to the outputs is made up for by the columns that are still to come, along a
row of the factor ``U`` of ``H⁻¹ = Uᵀ U``.

Columns are worked off in runs of at most `block_size` within a group; all that lies behind a run is updated by one
matrix product. Within a run a column costs nine small kernels; on a GPU they are captured once as a CUDA graph and
replayed, as is the search for scales. So a column costs what its kernels take to start from within a graph, some 2 µs
each: the 23 296 columns of the four stages of a Llama-7B block have a floor of 0.4 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.columns import ColumnLoop, ColumnOrder
from lowbit.algorithms.descent import Descent
from lowbit.algorithms.factor import Factor, factorize, full_precision
from lowbit.algorithms.grid import Choice, Grid, by_range, search
from lowbit.algorithms.replay import Replayed
from lowbit.algorithms.report import LayerReport, quadratic
from lowbit.algorithms.statistics import DEVIATION, HESSIAN, Statistics
from lowbit.core import IntCode, QuantSpec, QuantTensor, TableCode, pack
from lowbit.errors import PlanError

ScaleSearch = Literal["minmax", "diagonal", "conditional", "trial"]
Result = tuple[QuantTensor, LayerReport]
_TABLES = ("nf4", "fp4", "e2m1", "e2m3")
_TRIED = (0.85, 0.9, 0.95, 1.05, 1.1)  # times the scale that the search found
_SWEEPS = 2
_KEPT_SPECS = 2
_LEAST_CURVATURE = 1e-6  # of the mean diagonal: a column without inputs has none of its own


class Gptq(Algorithm):
    """Rounds column by column, correcting those to come.

    Args:
        damp_percent: what the Hessian's diagonal is raised by, as a fraction of its mean.
        desc_act: whether columns are worked off by falling activation. Where the spec is permuted, groups are made of
            columns in that order and a group index is stored; where it isn't, groups stay what they are, and they and
            the columns within them are worked off in that order.
        static_groups: whether all scales are chosen beforehand, on the weights as they were. With `desc_act` columns
            then are worked off in the order of activation over all groups, and nothing is permuted.
        symmetric: whether zero points stay in the middle of the range; so it is where a spec has none.
        block_size: how many columns are corrected one by one before all that follow are corrected at once.
        scale_search: ``minmax``: from the minimum to the maximum of a group, as in the paper; ``diagonal``: the scales
            with the least squared error, each column's weighted by ``H[i, i]``; ``conditional``: weighted by
            ``1 / U[i, i]²``, which is what its error costs when all later columns make up for it; ``trial``: besides,
            the group is worked off with six scales around that one, and the best kept (in groups of at most
            `block_size` columns that are in one piece). True and False are ``conditional`` and ``minmax``.
        sweeps: how often, afterwards, all codes and all scales are chosen anew, each given all the others, against the
            whole Hessian; each sweep costs about as much as the first pass. None for 2, and for 0 with ``minmax``,
            which then is the paper's algorithm.
        correction: whether the weight is first changed so as to undo the error of earlier layers (GPTAQ); this needs
            the deviation of the inputs.
        correction_strength: which part of that change is made, 0 to 1.

    Raises:
        PlanError: an argument is out of its range.
    """

    name: ClassVar[str] = "gptq"

    def __init__(
        self,
        damp_percent: float = 0.01,
        desc_act: bool = False,
        static_groups: bool = False,
        symmetric: bool = False,
        block_size: int = 128,
        scale_search: bool | ScaleSearch = True,
        sweeps: int | None = None,
        correction: bool = False,
        correction_strength: float = 1.0,
    ) -> None:
        if isinstance(scale_search, bool):
            scale_search = "conditional" if scale_search else "minmax"
        sweeps = (0 if scale_search == "minmax" else _SWEEPS) if sweeps is None else sweeps
        _require(scale_search in get_args(ScaleSearch), f"scale_search is one of {get_args(ScaleSearch)}", scale_search)
        _require(0 <= damp_percent <= 1, "damp_percent is a fraction of the mean diagonal, 0 to 1", damp_percent)
        _require(0 <= correction_strength <= 1, "correction_strength is between 0 and 1", correction_strength)
        _require(block_size > 0 and sweeps >= 0, "block_size is positive and sweeps not negative", (block_size, sweeps))
        self.damp_percent, self.desc_act, self.static_groups = damp_percent, desc_act, static_groups
        self.symmetric, self.block_size, self.sweeps = symmetric, block_size, sweeps
        self.scale_search: ScaleSearch = scale_search
        self.correction, self.correction_strength = correction, correction_strength
        self.needs = frozenset({HESSIAN, DEVIATION} if correction else {HESSIAN})
        self._tools: dict[tuple[QuantSpec, torch.device], _Tools] = {}

    def supports(self, spec: QuantSpec) -> bool:
        second = [spec.scale.second, spec.zero.second if spec.zero else None]
        if second != [None, None] or not spec.scale.stored or spec.activation.tensors():
            return False
        if spec.grouping.strided or spec.grouping.rows != 1:
            return False
        if isinstance(spec.code, TableCode):
            return spec.code.name in _TABLES
        if not isinstance(spec.code, IntCode):
            return False
        if spec.zero is None:
            return spec.code.signed and spec.bits > 1
        return not spec.code.signed if spec.zero.kind == "integer" else spec.scale.multiplier == 1.0

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """Round to nearest, with searched scales: nothing is known of the inputs."""
        return self.calibrated(weight, spec, Statistics())

    def calibrated(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantTensor:
        """See :meth:`Algorithm.calibrated` and :meth:`calibrated_many`."""
        return self.calibrated_with_report(weight, spec, statistics)[0]

    def calibrated_with_report(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> Result:
        """The same, and how well it went; see :meth:`calibrated_many`."""
        return self.calibrated_many([weight], [spec], statistics)[0]

    def calibrated_many(
        self, weights: Sequence[Tensor], specs: Sequence[QuantSpec], statistics: Statistics
    ) -> list[Result]:
        """Quantize several weights with the same inputs, which share what is made of the Hessian.

        Weights of equal specs also share the loop over the columns. Each comes out as it would alone, but for the order
        in which sums are rounded.

        Args:
            weights: ``[out, in]`` each, floating point, on one device.
            specs: one for each.
            statistics: of their inputs; those without tokens have the weights rounded to nearest.

        Raises:
            PlanError: a spec is not supported or doesn't divide the weight; a statistic that is needed is missing;
                a weight or a statistic has NaN or infinite values, or the wrong shape.
        """
        for weight, spec in zip(weights, specs, strict=True):
            self._check(weight, spec, weights[0].shape[1])
        results: dict[int, Result] = {}
        with torch.no_grad(), full_precision():
            inputs = _Inputs.of(statistics, weights[0], self)
            for spec in dict.fromkeys(specs):
                which = [number for number, other in enumerate(specs) if other == spec]
                made = _solve(self, [weights[number].float() for number in which], spec, inputs)
                results.update(zip(which, made, strict=True))
        return [results[number] for number in range(len(weights))]

    def tools(self, spec: QuantSpec, device: torch.device) -> _Tools:
        """What works on a spec; kept for the layers that follow, as are the graphs in it."""
        key = spec, device
        if key not in self._tools:
            if len(self._tools) >= _KEPT_SPECS:
                del self._tools[next(iter(self._tools))]
            self._tools[key] = _Tools(Grid(spec, self.symmetric, device))
        return self._tools[key]

    def _check(self, weight: Tensor, spec: QuantSpec, in_features: int) -> None:
        if not self.supports(spec):
            raise PlanError(f"gptq makes integers and 16-entry tables with groups along rows, not '{spec}'")
        if weight.dim() != 2 or weight.shape[1] != in_features or min(weight.shape) == 0:
            raise PlanError(f"weights that share their inputs are [out, {in_features}], not {list(weight.shape)}")
        if spec.grouping.flat and in_features % spec.grouping.cols:
            raise PlanError(f"blocks of {spec.grouping.cols} straddle the rows of a weight with {in_features} columns")
        if not bool(torch.isfinite(weight).all()):
            raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")


class _Tools:
    """A spec's levels, the loop over columns and the search for scales, which on a GPU keep graphs of their kernels."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.loop, self.search = grid, ColumnLoop(grid), Replayed(self._search, _two_columns)

    def _search(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        found = search(self.grid, weight, importance)
        return found.scale, found.zero


def _two_columns(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor[:2] for tensor in inputs)


@dataclass
class _Inputs:
    """What is known of the inputs, ready for the solver; `factors` keeps those of each order of the columns."""

    hessian: Tensor
    deviation: Tensor | None
    known: bool
    notes: tuple[str, ...]
    factors: dict[tuple[int, ...], Factor]

    @classmethod
    def of(cls, statistics: Statistics, weight: Tensor, settings: Gptq) -> _Inputs:
        size, device = weight.shape[1], weight.device
        if statistics.tokens == 0:
            note = "no calibration token reached this layer: its weights were rounded to nearest"
            return cls(torch.eye(size, device=device), None, False, (note,), {})
        hessian = _statistic(statistics.hessian, HESSIAN, weight)
        deviation = _statistic(statistics.deviation, DEVIATION, weight) if settings.correction else None
        few = statistics.tokens < size
        notes = (f"{statistics.tokens} tokens don't determine the Hessian of {size} inputs",) if few else ()
        if not bool(hessian.diagonal().any()):
            note = "all inputs of this layer were 0: its weights were rounded to nearest"
            return cls(torch.eye(size, device=device), None, False, (note,), {})
        return cls(hessian, deviation, True, notes, {})

    def factor(self, order: Tensor, damp_percent: float) -> Factor:
        """Of the Hessian with its columns in `order`."""
        size = len(order)
        if not self.known:
            return Factor(torch.eye(size, device=order.device), 0.0, 0, usable=False)
        key = tuple(order.tolist())
        if key not in self.factors:
            self.factors[key] = factorize(_ordered(self.hessian, order), damp_percent)
        return self.factors[key]


def _ordered(hessian: Tensor, order: Tensor) -> Tensor:
    """With its columns in another order; itself, not a copy, where that is the order it has."""
    plain = torch.arange(len(order), device=order.device)
    return hessian if torch.equal(order, plain) else hessian[order][:, order]


def _solve(settings: Gptq, weights: list[Tensor], spec: QuantSpec, inputs: _Inputs) -> list[Result]:
    """The weights, of one spec, side by side."""
    importance = inputs.hessian.diagonal()
    weight = torch.cat(weights)
    columns = ColumnOrder.of(
        spec.grouping, importance, desc_act=settings.desc_act and inputs.known, static=settings.static_groups
    )
    factor = inputs.factor(columns.order, settings.damp_percent)
    target = weight
    if inputs.deviation is not None and factor.usable:
        target = corrected(weight, inputs.deviation, columns.order, factor, settings.correction_strength)
    if settings.scale_search == "minmax" and factor.usable:
        target = target.masked_fill(importance == 0, 0)
    tools = settings.tools(spec, weight.device)
    grid = tools.grid
    levels, choice = _Solver(settings, tools, columns, factor, inputs.hessian).solve(target.t()[columns.order])
    if not bool(torch.isfinite(choice.scale).all() & torch.isfinite(choice.zero).all()):
        raise PlanError(f"a scale or zero of weights up to {float(target.abs().max()):g} is more than its dtype holds")
    codes = torch.empty_like(levels, dtype=torch.int16)
    codes[columns.order] = grid.codes(levels, choice.of(columns.group[columns.order]))
    results, start = [], 0
    for original in weights:
        rows = slice(start, start + len(original))
        shape = (len(original), original.shape[1])
        made = _store(grid, codes[:, rows].t(), choice.of((slice(None), rows)), columns, shape)
        results.append((made, _report(made, original, target[rows], inputs, factor)))
        start = rows.stop
    return results


def corrected(weight: Tensor, deviation: Tensor, order: Tensor, factor: Factor, strength: float) -> Tensor:
    """``W + strength * W D H⁻¹``: what comes nearest to the dense outputs, given the inputs that there are.

    ``|W x' - Q x|²`` over the tokens is ``tr(Q H Qᵀ) - 2 tr(W (H + D) Qᵀ)`` and a constant, least at
    ``Q = W (H + D) H⁻¹``; what Q adds to that is ``tr((W* - Q) H (W* - Q)ᵀ)``, GPTQ's own objective.

    Args:
        weight: ``[out, in]``.
        deviation: ``[in, in]``, D, the mean of ``(x' - x) xᵀ``.
        order: ``[in]``, of the factor's columns.
        factor: of the inverse of the (damped) Hessian.
        strength: 0 to 1.
    """
    change = (weight @ deviation)[:, order] @ factor.upper.t() @ factor.upper
    return weight + strength * torch.empty_like(weight).index_copy_(1, order, change)


class _Solver:
    """GPTQ over a weight whose columns come first, in order: ``fp32 [in, rows]``.

    Its results are levels, ``fp32 [in, rows]`` in the same order, and the choices of all groups, ``[groups, rows]``.
    """

    def __init__(self, settings: Gptq, tools: _Tools, columns: ColumnOrder, factor: Factor, hessian: Tensor) -> None:
        self.settings, self.columns, self.factor = settings, columns, factor
        self.grid, self.loop, self.search = tools.grid, tools.loop, tools.search
        self.hessian = _ordered(hessian, columns.order)
        self.groups, self.members = columns.group[columns.order], columns.columns()
        if settings.scale_search != "diagonal" and factor.usable:
            self.importance = factor.upper.diagonal().square().reciprocal()
        else:
            self.importance = self.hessian.diagonal().clamp(min=0)

    def solve(self, weight: Tensor) -> tuple[Tensor, Choice]:
        """The pass over the columns, the sweeps, and rounding to nearest for rows where that happens to be better."""
        levels, choice = self.first_pass(weight)
        if self.factor.usable and self.settings.sweeps:
            self.sweep(weight, levels, choice)
        if self.factor.usable and self.settings.scale_search != "minmax":
            levels, choice = self.or_nearest(weight, levels, choice)
        return levels, choice

    def first_pass(self, weight: Tensor) -> tuple[Tensor, Choice]:
        """Round column by column, each time correcting those behind."""
        upper, weight, levels = self.factor.upper, weight.clone(), torch.empty_like(weight)
        choice = self._nothing(weight)
        if self.columns.static:
            for number, within in enumerate(self.members):
                choice.put(number, self._choose(weight, within))
        chosen, numbers = -1, self.groups.tolist()
        for start, end in self.columns.runs(self.settings.block_size):
            if not self.columns.static and numbers[start] != chosen:
                chosen = numbers[start]
                choice.put(chosen, self._choose(weight, self.members[chosen]))
            meaning = self.grid.levels(choice.of(self.groups[start : end if self.columns.static else start + 1]))
            levels[start:end], errors = self.loop.run(weight[start:end], upper[start:end, start:end], meaning)
            if self.factor.usable and end < len(weight):
                weight[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
        return levels, choice

    def _choose(self, weight: Tensor, within: Tensor) -> Choice:
        """The scale and zero of a group, from its weights as they are now."""
        if self.settings.scale_search == "minmax":
            return by_range(self.grid, weight[within])
        scale, zero = self.search(weight[within], self.importance[within])
        best = Choice(scale, zero)
        whole = not self.columns.static and len(within) <= self.settings.block_size
        return self._try(weight[within], within, best) if self.settings.scale_search == "trial" and whole else best

    def _try(self, weight: Tensor, within: Tensor, best: Choice) -> Choice:
        """Work a group off with several scales, side by side as if they were rows, and keep each row's best."""
        resting = self.grid.resting_point(best)
        tried = [best] + [self.grid.kept_where_valid(self.grid.step(best) * by, resting, best) for by in _TRIED]
        all_ = Choice(torch.cat([one.scale for one in tried]), torch.cat([one.zero for one in tried]))
        levels = self.grid.levels(all_.of(None))
        _, errors = self.loop.run(weight.repeat(1, len(tried)), self.factor.upper[within][:, within], levels)
        costs = errors.square().sum(0).view(len(tried), -1)
        rows = torch.arange(weight.shape[1], device=weight.device)
        return all_.of(costs.argmin(0) * len(rows) + rows)

    def _nothing(self, weight: Tensor) -> Choice:
        shape = (self.columns.count, weight.shape[1])
        return Choice(weight.new_zeros(shape), weight.new_zeros(shape))

    def sweep(self, weight: Tensor, levels: Tensor, choice: Choice) -> None:
        """Coordinate descent over codes and scales, in place."""
        hessian = self.hessian.clone()
        hessian.diagonal().add_(max(self.factor.damp, _LEAST_CURVATURE) * hessian.diagonal().mean())
        descent = Descent(self.grid, self.loop, weight, levels, choice, self.members, hessian)
        for _ in range(self.settings.sweeps):
            descent.sweep(self.settings.block_size)

    def or_nearest(self, weight: Tensor, levels: Tensor, choice: Choice) -> tuple[Tensor, Choice]:
        """Rows for which plain rounding to nearest has the lower output error, as that makes them."""
        plain, rounded = self._nothing(weight), torch.empty_like(weight)
        for number, within in enumerate(self.members):
            plain.put(number, by_range(self.grid, weight[within]))
            rounded[within] = self.grid.nearest(weight[within], self.grid.levels(plain.of(number)))
        better = self._output_error(weight, rounded, plain) < self._output_error(weight, levels, choice)
        return torch.where(better, rounded, levels), plain.where(better, choice)

    def _output_error(self, weight: Tensor, levels: Tensor, choice: Choice) -> Tensor:
        error = weight - self.grid.value(levels, self.grid.levels(choice.of(self.groups)))
        return (error * (self.hessian @ error)).sum(0)


def _store(grid: Grid, codes: Tensor, choice: Choice, columns: ColumnOrder, shape: tuple[int, int]) -> QuantTensor:
    spec = grid.spec
    counts = spec.grouping.counts(shape)
    layout = spec.tensors(shape)
    scales = choice.scale.t().reshape(counts).to(spec.scale.dtype)
    stored = codes.reshape(-1) if spec.grouping.flat else codes
    packed = codes.to(layout["codes"][1]).contiguous() if spec.bits == 8 else pack(stored, spec.bits)
    tensors = {"codes": packed, "scales": scales.contiguous()}
    if spec.zero is not None:
        zeros = choice.zero.t().reshape(counts)
        integers = spec.zero.kind == "integer"
        tensors["zeros"] = pack(zeros.to(torch.int16), spec.zero.bits) if integers else zeros.to(spec.zero.dtype)
    if grid.table is not None:
        tensors["table"] = grid.table.clone()
    if spec.grouping.permuted:
        tensors["group_index"] = columns.group.to(torch.int32)
    return QuantTensor(spec, tensors, shape).validate()


def _report(made: QuantTensor, weight: Tensor, target: Tensor, inputs: _Inputs, factor: Factor) -> LayerReport:
    dense = made.dequantize()
    notes = inputs.notes
    if inputs.known and not factor.usable:
        notes += (f"the Hessian could not be factorized in {factor.attempts} attempts: rounded to nearest",)
    elif factor.attempts > 1:
        notes += (f"the Hessian could be factorized only with {factor.damp:g} of its mean diagonal added",)
    error = quadratic(target - dense, inputs.hessian)
    return LayerReport(
        damp=factor.damp,
        attempts=factor.attempts,
        fallback=not factor.usable,
        weight_error=_ratio((weight - dense).square().sum(), weight.square().sum()),
        output_error=_ratio(error, quadratic(weight, inputs.hessian)),
        notes=notes,
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Of two errors; 0 where there is nothing to err about."""
    return float(part) / float(whole) if float(whole) > 0 else 0.0


def _statistic(value: Tensor | None, name: str, weight: Tensor) -> Tensor:
    size = weight.shape[1]
    if value is None:
        raise PlanError(f"gptq needs the {name} of the inputs, which was not collected")
    if tuple(value.shape) != (size, size):
        raise PlanError(f"the {name} of {size} inputs is [{size}, {size}], not {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise PlanError(f"the {name} holds NaN or infinite values; look for them in the calibration data")
    return value.to(weight.device, torch.float32)


def _require(condition: bool, message: str, found: object) -> None:
    if not condition:
        raise PlanError(f"{message}; found {found!r}")
