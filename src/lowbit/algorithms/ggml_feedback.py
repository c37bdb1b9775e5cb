"""GPTQ for ggml's types (arXiv:2210.17323; with vectors for numbers LDLQ, arXiv:2307.13304).

A weight is worked off in blocks of 256 columns. Scales (and mins) of a block are searched as llama.cpp searches them,
on the weights as the errors of earlier blocks have left them. Then number by number, or vector by vector, the nearest
one is taken, and what that did to the outputs is made up for by all that follows, along a row of the factor U of
``H⁻¹ = Uᵀ U``. Afterwards everything is chosen again, given all the rest: levels, integers of the scales and
super-scales, so as to lower the error ``tr((W - Q) H (W - Q)ᵀ)``. The result is an ordinary tensor of its type.
"""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.factor import Factor, factorize, full_precision
from lowbit.algorithms.ggml import GgmlBlocks, checked_importance, made_in_chunks, maker_for, rows_at_once
from lowbit.algorithms.ggml_numbers import Factors, Numbers, numbers_for, search_fields
from lowbit.algorithms.ggml_parts import SUPER, Parts, require_finite
from lowbit.algorithms.gptq import corrected
from lowbit.algorithms.report import LayerReport
from lowbit.algorithms.statistics import DEVIATION, HESSIAN, Statistics
from lowbit.core import BlockCode, QuantSpec, QuantTensor
from lowbit.core.block_encoding import BlockFields
from lowbit.core.ggml import ggml_type_of
from lowbit.errors import PlanError

_TYPES: Final = frozenset(
    {
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    }
)
_LEAST_CURVATURE: Final = 1e-6  # of the mean diagonal: a column without inputs has none of its own


class ErrorFeedbackBlocks(Algorithm):
    """Every type of ggml's whose scales are searched, rounded with feedback of the error.

    Args:
        damp_percent: what the Hessian's diagonal is raised by, as a fraction of its mean.
        sweeps: how often everything is chosen again afterwards; each costs about as much as the first pass without its
            search of scales.
        correction: whether the weight is first changed so as to undo the error of earlier layers (GPTAQ,
            arXiv:2504.02692); this needs the deviation of the inputs.
        correction_strength: 0 to 1, how much of that change is made.
    """

    name: ClassVar[str] = "ggml-feedback"

    def __init__(
        self,
        damp_percent: float = 0.01,
        sweeps: int = 2,
        *,
        correction: bool = False,
        correction_strength: float = 1.0,
    ) -> None:
        if not 0 <= damp_percent <= 1 or sweeps < 0:
            raise PlanError(
                f"damp_percent is a fraction of the mean diagonal, 0 to 1, and sweeps not negative; "
                f"found {damp_percent!r} and {sweeps!r}"
            )
        if not 0 <= correction_strength <= 1:
            raise PlanError(f"correction_strength is between 0 and 1; found {correction_strength!r}")
        self.damp_percent, self.sweeps = damp_percent, sweeps
        self.correction, self.correction_strength = correction, correction_strength
        self.needs = frozenset({HESSIAN, DEVIATION} if correction else {HESSIAN})

    def supports(self, spec: QuantSpec) -> bool:
        return ggml_type_of(spec) in _TYPES

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """What :class:`GgmlBlocks` makes of the weight alone: nothing is known of the inputs."""
        return GgmlBlocks().quantize(weight, spec)

    def calibrated(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantTensor:
        """See :meth:`calibrated_with_report`."""
        return self.calibrated_with_report(weight, spec, statistics)[0]

    def calibrated_with_report(
        self, weight: Tensor, spec: QuantSpec, statistics: Statistics
    ) -> tuple[QuantTensor, LayerReport]:
        """Quantize ``weight [out, in]``, and say how well it went.

        Without a token, with inputs that are all 0, or where the Hessian can't be factorized, the result is that of
        :class:`GgmlBlocks`, and the report says so.

        Raises:
            PlanError: the spec is none of those that are made; rows that aren't whole blocks; the Hessian is missing,
                has another shape, or isn't finite; the weight has values that the type can't hold.
        """
        if not self.supports(spec):
            raise PlanError(f"error feedback makes {', '.join(sorted(_TYPES))}; not '{spec}'")
        name, _ = maker_for(spec, weight)
        require_finite(name, weight)
        dense = weight.float()
        hessian = _hessian(statistics, weight)
        factor = None if hessian is None else factorize(_damped(hessian, 0.0), self.damp_percent)
        if hessian is None or factor is None or not factor.usable:
            note = "no Hessian to go by: only scales were searched"
            made = GgmlBlocks().calibrated(weight, spec, _diagonal(statistics, hessian, weight))
            return made, _report(dense, made, hessian, factor, (note,))
        with torch.no_grad(), full_precision():
            target = self._target(dense, statistics, factor)
            numbers = numbers_for(name, spec, (weight.shape[0], weight.shape[1]), weight.device)
            _first_pass(name, spec, target, factor.upper, hessian.diagonal(), numbers)
            damped = _damped(hessian, factor.damp)
            for _ in range(self.sweeps):
                _sweep(numbers, target.t(), damped)
        made = _stored(name, spec, numbers, (weight.shape[0], weight.shape[1]))
        return made, _report(target, made, hessian, factor, ())

    def _target(self, dense: Tensor, statistics: Statistics, factor: Factor) -> Tensor:
        if not self.correction:
            return dense
        if statistics.deviation is None:
            raise PlanError("correction needs the deviation of a layer's inputs from those of the dense model")
        deviation, size = statistics.deviation.to(dense.device, torch.float32), dense.shape[1]
        if tuple(deviation.shape) != (size, size) or not bool(torch.isfinite(deviation).all()):
            raise PlanError(f"the deviation is finite and [{size}, {size}]; found {list(deviation.shape)}")
        return corrected(dense, deviation, torch.arange(size, device=dense.device), factor, self.correction_strength)


def _hessian(statistics: Statistics, weight: Tensor) -> Tensor | None:
    """``fp32 [in, in]`` beside the weight; None where it says nothing."""
    if statistics.hessian is None:
        raise PlanError("error feedback needs the Hessian of a layer's inputs: calibrate, or use GgmlBlocks")
    hessian, size = statistics.hessian.to(weight.device, torch.float32), weight.shape[1]
    if tuple(hessian.shape) != (size, size):
        raise PlanError(f"a Hessian of shape {list(hessian.shape)} for a weight with {size} columns")
    if not bool(torch.isfinite(hessian).all()):
        raise PlanError("the Hessian holds NaN or infinite values")
    return hessian if statistics.tokens > 0 and bool(hessian.diagonal().any()) else None


def _diagonal(statistics: Statistics, hessian: Tensor | None, weight: Tensor) -> Statistics:
    squares = torch.ones(weight.shape[1], device=weight.device) if hessian is None else hessian.diagonal().clamp(min=0)
    return Statistics(statistics.tokens, squares=squares)


def _damped(hessian: Tensor, damp: float) -> Tensor:
    """With a little more on the diagonal, even if no damping is asked for: columns without inputs have none there."""
    damped = hessian.clone()
    damped.diagonal().add_(max(damp, _LEAST_CURVATURE) * hessian.diagonal().mean())
    return damped


def _first_pass(name: str, spec: QuantSpec, dense: Tensor, upper: Tensor, importance: Tensor, numbers: Numbers) -> None:
    """Choose everything once, from the first column to the last."""
    weight = dense.t().clone()
    importance = checked_importance(importance.clamp(min=0), dense)
    for start in range(0, len(weight), SUPER):
        end = min(start + SUPER, len(weight))
        numbers.begin(start, _scales(name, spec, weight[start:end].t(), importance[start:end]))
        errors = _block(numbers, start, weight[start:end], upper[start:end, start:end])
        weight[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)


def _scales(name: str, spec: QuantSpec, rows: Tensor, importance: Tensor) -> Parts | BlockFields:
    if isinstance(spec.code, BlockCode):
        made = [search_fields(name, part.contiguous(), importance) for part in rows.split(rows_at_once(rows))]
        return BlockFields(*(torch.cat(field) for field in zip(*made, strict=True)))
    return made_in_chunks(name, spec, rows, importance)


def _block(numbers: Numbers, start: int, weight: Tensor, upper: Tensor) -> Tensor:
    """Work off a block's columns, ``[columns, rows]``, which are corrected in place; the errors to be passed on."""
    unit, errors = numbers.unit, torch.empty_like(weight)
    inverses = torch.linalg.inv(_diagonal_blocks(upper, unit))
    metrics = inverses @ inverses.transpose(1, 2)
    for column in range(0, len(weight), unit):
        part = slice(column, column + unit)
        value = numbers.choose(start + column, weight[part], metrics[column // unit])
        errors[part] = inverses[column // unit].t() @ (weight[part] - value)
        weight[column + unit :].addmm_(upper[part, column + unit :].t(), errors[part], alpha=-1)
    return errors


def _diagonal_blocks(matrix: Tensor, unit: int) -> Tensor:
    """``[n, n] -> [n / unit, unit, unit]``."""
    count = len(matrix) // unit
    return matrix.reshape(count, unit, count, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _sweep(numbers: Numbers, target: Tensor, hessian: Tensor) -> None:
    """Choose everything again, in place, each given all the rest."""
    error = target - _value(numbers)
    for start in range(0, len(target), SUPER):
        end = min(start + SUPER, len(target))
        block = _Block(numbers, start, hessian[start:end] @ error, hessian[start:end, start:end])
        block.run()
        error[start:end] -= block.change


def _value(numbers: Numbers) -> Tensor:
    value = numbers.levels * _every(numbers.scales)
    return value if numbers.zeros is None else value + _every(numbers.zeros)


def _every(factors: Factors) -> Tensor:
    """One per column, ``[in, rows]``."""
    return factors.units(0, len(factors.integers) * factors.size) * factors.supers.repeat_interleave(
        factors.span, dim=0
    )


class _Block:
    """A block of columns in a sweep.

    Attributes:
        slope: ``H e`` of its columns, ``[columns, rows]``, with e the error of all columns as it is now.
        change: by how much its values have changed so far.
    """

    def __init__(self, numbers: Numbers, start: int, slope: Tensor, hessian: Tensor) -> None:
        self.numbers, self.start, self.slope, self.hessian = numbers, start, slope, hessian
        self.change = torch.zeros_like(slope)
        self._inverses = torch.linalg.inv(_diagonal_blocks(hessian, numbers.unit))

    def run(self) -> None:
        size, columns = self.numbers.scales.size, len(self.slope)
        for first in range(0, columns, size):
            for column in range(first, first + size, self.numbers.unit):
                self._levels(column)
            if self.numbers.scales.low < self.numbers.scales.high:
                self._integers(self.numbers.scales, first, self.numbers.levels[self.start + first :][:size])
                if self.numbers.zeros is not None:
                    self._integers(self.numbers.zeros, first, torch.ones_like(self.slope[:size]))
        span = self.numbers.scales.span
        for first in range(0, columns, span):
            self._supers(self.numbers.scales, first, self.numbers.levels[self.start + first :][:span])
            if self.numbers.zeros is not None:
                self._supers(self.numbers.zeros, first, torch.ones_like(self.slope[:span]))

    def _apply(self, first: int, change: Tensor) -> None:
        part = slice(first, first + len(change))
        self.change[part] += change
        self.slope.addmm_(self.hessian[:, part], change, alpha=-1)

    def _levels(self, column: int) -> None:
        numbers, unit = self.numbers, self.numbers.unit
        part, at = slice(column, column + unit), self.start + column
        group, own = at // numbers.scales.size, self.hessian[part, part]
        before = numbers.levels[at : at + unit] * numbers.scales.of(group)
        if numbers.zeros is not None:
            before = before + numbers.zeros.of(group)
        wanted = before + self._inverses[column // unit] @ self.slope[part]
        self._apply(column, numbers.choose(at, wanted, own) - before)

    def _gains(self, first: int, change: Tensor) -> Tensor:
        """Where a change of the columns from `first` on lowers the error."""
        part = slice(first, first + len(change))
        return (change * (2 * self.slope[part] - self.hessian[part, part] @ change)).sum(0) > 0

    def _step(self, first: int, unit: Tensor) -> Tensor:
        """How much of `unit` should be added to the columns from `first` on, by least squares."""
        part = slice(first, first + len(unit))
        curvature = (unit * (self.hessian[part, part] @ unit)).sum(0)
        return torch.where(curvature > 0, (unit * self.slope[part]).sum(0) / curvature, 0)

    def _integers(self, factors: Factors, first: int, levels: Tensor) -> None:
        group = (self.start + first) // factors.size
        before = factors.of(group)
        integers = factors.integers[group].clone()
        factors.integers[group] = factors.nearest(group, before + self._step(first, levels))
        change = levels * (factors.of(group) - before)
        better = self._gains(first, change)
        factors.integers[group] = torch.where(better, factors.integers[group], integers)
        self._apply(first, change * better)

    def _supers(self, factors: Factors, first: int, levels: Tensor) -> None:
        at = self.start + first
        number, unit = at // factors.span, levels * factors.units(at // factors.size, len(levels))
        before = factors.supers[number]
        after = (before + self._step(first, unit)).half().float()
        change = torch.where(torch.isfinite(after), after - before, 0) * unit
        better = self._gains(first, change) & torch.isfinite(after)
        factors.supers[number] = torch.where(better, after, before)
        self._apply(first, change * better)


def _stored(name: str, spec: QuantSpec, numbers: Numbers, shape: tuple[int, int]) -> QuantTensor:
    require_finite(name, numbers.scales.supers.half())
    layout = spec.tensors(shape)
    tensors = {key: part if key == "table" else part.view(layout[key][0]) for key, part in numbers.tensors().items()}
    return QuantTensor(spec, tensors, shape).validate()


def _report(
    dense: Tensor, made: QuantTensor, hessian: Tensor | None, factor: Factor | None, notes: tuple[str, ...]
) -> LayerReport:
    error = dense - made.dequantize(torch.float32)
    plain = float(error.square().sum() / dense.square().sum().clamp(min=1e-30))
    output = plain
    if hessian is not None:
        output = float((error @ hessian * error).sum() / (dense @ hessian * dense).sum().clamp(min=1e-30))
    used = factor is not None and factor.usable
    return LayerReport(
        factor.damp if factor and used else 0.0, factor.attempts if factor else 0, not used, plain, output, notes
    )
