"""`AdditiveQuantization`: codebooks learned for one layer, with or without statistics of its inputs (AQLM)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.aqlm.fit import fitted_codebooks, fitted_scales
from lowbit.algorithms.aqlm.search import revised_codes, sequential_codes
from lowbit.algorithms.aqlm.start import residual_kmeans
from lowbit.algorithms.aqlm.tiles import decode, row_errors, to_tiles
from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.statistics import HESSIAN, Statistics
from lowbit.core import Grouping, QuantSpec, QuantTensor, VectorCode
from lowbit.errors import PlanError

_EXACT = 1e-9  # of the weight's own error: nothing is left to improve
_MOST_DAMPING = 1.0
_WIDER = 2  # times the beam: beginnings of rows are decided once only, tiles are revised again and again


@dataclass(frozen=True)
class _Problem:
    """Make ``tr((W - V) H (W - V)ᵀ)`` small.

    Attributes:
        weight: ``fp32 [out, in]``.
        hessian: ``fp32 [in, in]``, positive definite.
        factor: ``fp32 [in, in]``, upper triangular: U of ``H = U Uᵀ``.
        code: what V is made of.
        order: ``int64 [in/ig]``: which group of columns stands where; those that matter most come first, since
            the search decides them first.
    """

    weight: Tensor
    hessian: Tensor
    factor: Tensor
    code: VectorCode
    order: Tensor


@dataclass(frozen=True)
class _Solution:
    """``codes int64 [out/og, in/ig, M]``, ``codebooks fp32 [M, K, og, ig]``, ``scales fp32 [out/og]``, and the error of
    each row of tiles.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    errors: Tensor

    @property
    def error(self) -> float:
        return float(self.errors.sum())


class AdditiveQuantization(Algorithm):
    """Tiles as sums of vectors from learned codebooks (AQLM, arXiv:2401.06118).

    Starts from rows of unit length, codebooks by k-means of the residuals and codes by a beam search along each row.
    Then, in turns: the codebooks and scales of the least error ``tr(dW H dWᵀ)`` for the codes, by conjugate gradients
    (the paper takes steps of Adam), and better codes for the codebooks, until the error stays. H is the mean of
    ``x xᵀ`` over the layer's inputs; without statistics it is the identity.

    Deterministic: the same weight, statistics, parameters and device give the same bits.

    Args:
        beam: how many sums the search for a tile's codes keeps, 1 to 8 are sensible; twice as many along a row.
        epochs: at most so many turns.
        steps: of conjugate gradients per turn.
        tolerance: ends the turns when one lowers the error by less than this part.
        iterations: of k-means at the start.
        seed: of k-means.
        damping: is added to the diagonal of the Hessian, times its mean.

    Raises:
        PlanError: a parameter is out of its range.
    """

    name: ClassVar[str] = "aqlm"
    needs: frozenset[str] = frozenset({HESSIAN})

    def __init__(
        self,
        beam: int = 4,
        epochs: int = 8,
        steps: int = 8,
        tolerance: float = 0.003,
        iterations: int = 12,
        seed: int = 0,
        damping: float = 0.01,
    ) -> None:
        for name, value, least in (
            ("beam", beam, 1),
            ("epochs", epochs, 0),
            ("steps", steps, 0),
            ("iterations", iterations, 0),
            ("tolerance", tolerance, 0.0),
            ("damping", damping, 0.0),
        ):
            if not value >= least:
                raise PlanError(f"aqlm: {name} is {value!r}; it has to be {least} or more")
        self.beam, self.epochs, self.steps, self.tolerance = beam, epochs, steps, tolerance
        self.iterations, self.seed, self.damping = iterations, seed, damping

    def supports(self, spec: QuantSpec) -> bool:
        return (
            isinstance(spec.code, VectorCode)
            and spec.scale.stored
            and (spec.scale.second, spec.scale.multiplier) == (None, 1.0)
            and spec.grouping == Grouping(spec.code.out_group, 0)
            and spec.activation.kind == "none"
        )

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`; all inputs matter alike."""
        return self.calibrated(weight, spec, Statistics())

    @torch.no_grad()
    def calibrated(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantTensor:
        """See :meth:`Algorithm.calibrated`.

        Raises:
            PlanError: the spec is of another kind, the weight or the Hessian has NaN or infinite values, tiles don't
                divide the weight, the Hessian has another shape or can't be factored, or scales are more than their
                dtype holds.
        """
        if not self.supports(spec) or not isinstance(spec.code, VectorCode):
            raise PlanError(f"aqlm makes sums of vectors with one scale per row of tiles, not '{spec}'")
        problem = self._problem(weight, spec.code, statistics)
        solution = self._solve(problem)
        return _stored(problem, solution, spec)

    def _problem(self, weight: Tensor, code: VectorCode, statistics: Statistics) -> _Problem:
        dense = weight.detach().float()
        if dense.shape[0] % code.out_group or dense.shape[1] % code.in_group:
            sides = f"{dense.shape[0]} x {dense.shape[1]}"
            raise PlanError(f"tiles of {code.out_group} x {code.in_group} don't divide a weight of {sides}")
        if not bool(torch.isfinite(dense).all()):
            raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")
        hessian = _hessian(statistics, dense)
        order = hessian.diagonal().view(-1, code.in_group).sum(1).argsort(descending=True, stable=True)
        columns = _columns(order, code.in_group)
        hessian, factor = self._factored(hessian[columns][:, columns])
        return _Problem(dense[:, columns].contiguous(), hessian, factor, code, order)

    def _factored(self, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """The damped Hessian and its factor; more damping where that of the settings isn't enough."""
        mean, damping = hessian.diagonal().mean(), self.damping
        while damping <= _MOST_DAMPING:
            damped = hessian.clone()
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not int(failed):
                return damped, lower.flip(0, 1)
            damping = max(10 * damping, 1e-4)
        raise PlanError("the Hessian is not positive definite, even with its mean diagonal added: no inputs give such")

    def _solve(self, problem: _Problem) -> _Solution:
        solution = self._start(problem)
        least = _EXACT * float(row_errors(problem.weight, problem.hessian).sum())
        if solution.error <= least:
            return solution
        solution = self._revised(problem, self._sequential(problem, solution))
        for _ in range(self.epochs):
            before = solution.error
            solution = self._revised(problem, self._fitted(problem, solution))
            if solution.error <= least or solution.error > (1 - self.tolerance) * before:
                break
        return solution

    def _start(self, problem: _Problem) -> _Solution:
        code, weight = problem.code, problem.weight
        scales = weight.view(-1, code.out_group * weight.shape[1]).square().mean(1).sqrt()
        tiles = to_tiles(_divided(weight, scales), code.out_group, code.in_group)
        diagonal = problem.hessian.diagonal().view(-1, code.in_group).sum(1)
        weights = scales.square().unsqueeze(1) * diagonal
        codes, books = residual_kmeans(
            tiles.flatten(0, 1), weights.flatten(), code.codebooks, 1 << code.bits, self.iterations, self.seed
        )
        codebooks = books.view(code.codebooks, -1, code.out_group, code.in_group)
        return _measured(problem, codes.view(*tiles.shape[:2], -1), codebooks, scales)

    def _fitted(self, problem: _Problem, solution: _Solution) -> _Solution:
        """Codebooks and scales for the codes."""
        weight, hessian, codes = problem.weight, problem.hessian, solution.codes
        books = fitted_codebooks(weight, hessian, codes, solution.codebooks, solution.scales, self.steps)
        scales = fitted_scales(weight, hessian, codes, books, solution.scales)
        return _measured(problem, codes, books, scales)

    def _sequential(self, problem: _Problem, solution: _Solution) -> _Solution:
        normal, books = _divided(problem.weight, solution.scales), solution.codebooks
        codes = sequential_codes(normal, problem.factor, books, _WIDER * self.beam)
        return _better(solution, _measured(problem, codes, books, solution.scales))

    def _revised(self, problem: _Problem, solution: _Solution) -> _Solution:
        normal, books = _divided(problem.weight, solution.scales), solution.codebooks
        codes = revised_codes(normal, problem.hessian, books, solution.codes, self.beam)
        return _better(solution, _measured(problem, codes, books, solution.scales))


def _hessian(statistics: Statistics, weight: Tensor) -> Tensor:
    """The Hessian on the weight's device, the identity where nothing is known or no input was ever other than zero."""
    size, found = weight.shape[1], statistics.hessian
    identity = torch.eye(size, device=weight.device)
    if found is None:
        return identity
    if tuple(found.shape) != (size, size):
        raise PlanError(f"the Hessian of {size} inputs is {size} x {size}, not {' x '.join(map(str, found.shape))}")
    hessian = found.to(weight.device, torch.float32)
    if not bool(torch.isfinite(hessian).all()):
        raise PlanError("the Hessian holds NaN or infinite values; the inputs that it was made of are broken")
    mean = hessian.diagonal().mean()
    return hessian / mean if float(mean) > 0 else identity


def _columns(order: Tensor, size: int) -> Tensor:
    """``int64 [in]``: the columns of groups of `size` that stand in an order."""
    return (order.unsqueeze(1) * size + torch.arange(size, device=order.device)).flatten()


def _divided(weight: Tensor, scales: Tensor) -> Tensor:
    """Rows of tiles by their scales; by 1 where the scale is 0."""
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (weight.view(len(scales), -1) / safe.unsqueeze(1)).view_as(weight)


def _measured(problem: _Problem, codes: Tensor, codebooks: Tensor, scales: Tensor) -> _Solution:
    shape = (problem.weight.shape[0], problem.weight.shape[1])
    difference = problem.weight - decode(codes, codebooks, scales, shape)
    errors = row_errors(difference, problem.hessian).view(len(scales), -1).sum(1)
    return _Solution(codes, codebooks, scales, errors)


def _better(left: _Solution, right: _Solution) -> _Solution:
    """Of two solutions that differ in codes the better one in each row of tiles."""
    first = left.errors <= right.errors
    codes = torch.where(first.view(-1, 1, 1), left.codes, right.codes)
    return replace(left, codes=codes, errors=torch.minimum(left.errors, right.errors))


def _stored(problem: _Problem, solution: _Solution, spec: QuantSpec) -> QuantTensor:
    """Rounded to what is stored; the scales are fitted once more to the rounded codebooks."""
    code, dtype, shape = problem.code, spec.scale.dtype, (problem.weight.shape[0], problem.weight.shape[1])
    codebooks = solution.codebooks.to(dtype)
    refitted = fitted_scales(problem.weight, problem.hessian, solution.codes, codebooks.float(), solution.scales)
    scales = refitted.to(dtype).view(-1, 1)
    if not bool(torch.isfinite(scales).all() and torch.isfinite(codebooks).all()):
        raise PlanError(f"a scale of {float(refitted.abs().max()):g} is more than {dtype} holds")
    codes = solution.codes[:, problem.order.argsort()]
    codes = torch.where(codes >> (code.bits - 1) > 0, codes - (1 << code.bits), codes)
    tensors = {"codes": codes.to(code.index_dtype), "codebooks": codebooks, "scales": scales}
    return QuantTensor(spec, tensors, shape).validate()
