"""GPTQ (arXiv:2210.17323) with searched scales, GPTAQ's correction (arXiv:2504.02692), and refinement by descent.

The error of a layer's outputs, ``tr((W - Q) H (W - Q)ᵀ)`` with ``H`` the mean of ``x xᵀ``, is lowered column by column:
each column is rounded, and what that did to the outputs is made up for by the columns that are still to come, along a
row of the factor ``U`` of ``H⁻¹ = Uᵀ U``.

Columns are worked off in runs of at most `block_size` within a group. Within a run a column costs eight kernels of the
size of the run (divide, round, clamp, multiply, subtract, divide, rank-1 update, and the copy of codes); on a GPU they
are captured once as a CUDA graph and replayed, so that a column costs their execution, not their launches. All that
lies behind the run is updated by one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.columns import ColumnLoop, ColumnOrder
from lowbit.algorithms.descent import Descent
from lowbit.algorithms.factor import Factor, factorize, full_precision
from lowbit.algorithms.grid import Choice, Grid, by_range, search
from lowbit.algorithms.report import LayerReport
from lowbit.algorithms.statistics import DEVIATION, HESSIAN, Statistics
from lowbit.core import IntCode, QuantSpec, QuantTensor, TableCode, pack
from lowbit.errors import PlanError

ScaleSearch = Literal["diagonal", "conditional", "minmax"]
Result = tuple[QuantTensor, LayerReport]
_TABLES = ("nf4", "fp4", "e2m1", "e2m3")


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
        scale_search: ``conditional``: scales with the least squared error, each column's weighted by ``1 / U[i, i]²``,
            which is what its error costs when all later columns make up for it; ``diagonal``: weighted by ``H[i, i]``;
            ``minmax``: from the minimum to the maximum, as in the paper. True and False are the first and the last.
        sweeps: how often, afterwards, all codes and all scales are chosen anew, each given all the others, against the
            whole Hessian; each sweep lowers the output error, and costs as much as the first pass.
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
        sweeps: int = 0,
        correction: bool = False,
        correction_strength: float = 1.0,
    ) -> None:
        searches: dict[object, ScaleSearch] = {True: "conditional", False: "minmax"}
        search_ = searches.get(scale_search, scale_search) if isinstance(scale_search, bool) else scale_search
        _require(search_ in ("diagonal", "conditional", "minmax"), "unknown scale search", scale_search)
        _require(0 <= damp_percent <= 1, "damp_percent is a fraction of the mean diagonal, 0 to 1", damp_percent)
        _require(0 <= correction_strength <= 1, "correction_strength is between 0 and 1", correction_strength)
        _require(block_size > 0 and sweeps >= 0, "block_size is positive and sweeps not negative", (block_size, sweeps))
        self.damp_percent, self.desc_act, self.static_groups = damp_percent, desc_act, static_groups
        self.symmetric, self.block_size, self.sweeps = symmetric, block_size, sweeps
        self.scale_search: ScaleSearch = search_  # type: ignore[assignment]
        self.correction, self.correction_strength = correction, correction_strength
        self.needs = frozenset({HESSIAN, DEVIATION} if correction else {HESSIAN})

    def supports(self, spec: QuantSpec) -> bool:
        levels = [spec.scale.second, spec.zero.second if spec.zero else None]
        if levels != [None, None] or not spec.scale.stored or spec.grouping.strided or spec.grouping.rows != 1:
            return False
        if isinstance(spec.code, TableCode):
            return spec.code.name in _TABLES
        plain = spec.scale.multiplier == 1.0 or spec.zero is None or spec.zero.kind == "integer"
        return isinstance(spec.code, IntCode) and plain

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

        Weights of equal specs also share the loop over the columns. Each comes out as it would alone.

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

    def _check(self, weight: Tensor, spec: QuantSpec, in_features: int) -> None:
        if not self.supports(spec):
            raise PlanError(f"gptq makes integers and 16-entry tables with groups along rows, not '{spec}'")
        if weight.dim() != 2 or weight.shape[1] != in_features or min(weight.shape) == 0:
            raise PlanError(f"weights that share their inputs are [out, {in_features}], not {list(weight.shape)}")
        if spec.grouping.flat and in_features % spec.grouping.cols:
            raise PlanError(f"blocks of {spec.grouping.cols} straddle the rows of a weight with {in_features} columns")
        if not bool(torch.isfinite(weight).all()):
            raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")


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
            self.factors[key] = factorize(self.hessian[order][:, order], damp_percent)
        return self.factors[key]


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
    grid = Grid(spec, settings.symmetric, weight.device)
    ordered = target.t()[columns.order]
    levels, choice = _Solver(settings, grid, columns, factor, importance).run(ordered)
    if settings.sweeps and factor.usable:
        hessian = inputs.hessian[columns.order][:, columns.order]
        hessian.diagonal().add_(max(factor.damp, 1e-6) * float(hessian.diagonal().mean()))
        descent = Descent(grid, ordered, levels, choice, columns.columns(), hessian)
        for _ in range(settings.sweeps):
            descent.sweep(settings.block_size)
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
    """One pass of GPTQ over a weight whose columns come first, in order."""

    def __init__(self, settings: Gptq, grid: Grid, columns: ColumnOrder, factor: Factor, diagonal: Tensor) -> None:
        self.settings, self.grid, self.columns, self.factor = settings, grid, columns, factor
        if settings.scale_search == "conditional" and factor.usable:
            self.importance = factor.upper.diagonal().square().reciprocal()
        else:
            self.importance = diagonal[columns.order].clamp(min=0)

    def run(self, weight: Tensor) -> tuple[Tensor, Choice]:
        """Quantize ``fp32 [in, rows]``.

        Returns:
            Levels, ``fp32 [in, rows]``, in the same order, and the choices of all groups, ``[groups, rows]``.
        """
        upper, weight, levels = self.factor.upper, weight.clone(), torch.empty_like(weight)
        choice = Choice(weight.new_zeros(self.columns.count, weight.shape[1]),
                        weight.new_zeros(self.columns.count, weight.shape[1]))  # fmt: skip
        groups, members = self.columns.group[self.columns.order], self.columns.columns()
        if self.columns.static:
            for number, within in enumerate(members):
                choice.put(number, self._choose(weight, within))
        loop, chosen = ColumnLoop(self.grid), -1
        numbers = groups.tolist()
        for start, end in self.columns.runs(self.settings.block_size):
            if not self.columns.static and numbers[start] != chosen:
                chosen = numbers[start]
                choice.put(chosen, self._choose(weight, members[chosen]))
            meaning = self.grid.levels(choice.of(groups[start : end if self.columns.static else start + 1]))
            levels[start:end], errors = loop.run(weight[start:end], upper[start:end, start:end], meaning)
            if self.factor.usable and end < len(weight):
                weight[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
        return levels, choice

    def _choose(self, weight: Tensor, within: Tensor) -> Choice:
        """The scale and zero of a group, from its weights as they are now."""
        if self.settings.scale_search == "minmax":
            return by_range(self.grid, weight[within])
        return search(self.grid, weight[within], self.importance[within])


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
    error = _quadratic(target - dense, inputs.hessian)
    return LayerReport(
        damp=factor.damp,
        attempts=factor.attempts,
        fallback=not factor.usable,
        weight_error=_ratio((weight - dense).square().sum(), weight.square().sum()),
        output_error=_ratio(error, _quadratic(weight, inputs.hessian)),
        notes=notes,
    )


def _quadratic(weight: Tensor, hessian: Tensor) -> Tensor:
    return ((weight @ hessian) * weight).sum()


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
