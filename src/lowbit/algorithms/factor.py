"""Factorizing a Hessian that may be singular: damping, and what GPTQ needs of the inverse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_RAISE = 10.0
_LEAST_DAMP = 1e-4
_MOST_DAMP = 10.0
_WIDEST_DOUBLE = 32768  # in fp64 the three matrices of a wider layer would fill a GPU


@dataclass(frozen=True)
class Factor:
    """``(H + damp * mean(diag H) * I)⁻¹ = upperᵀ @ upper``.

    Attributes:
        upper: ``fp32 [in, in]``, upper triangular.
        damp: a fraction of the mean of the diagonal.
        attempts: how often it took until the factorization came out.
        usable: false where none did; `upper` then is diagonal.
    """

    upper: Tensor
    damp: float
    attempts: int
    usable: bool = True


def factorize(hessian: Tensor, damp_percent: float) -> Factor:
    """Factorize the inverse of a damped Hessian, with ten times the damping after each failure.

    Instead of inverting and factorizing the inverse (GPTQ's order, whose errors grow with the square of the condition
    number), the reversed Hessian is factorized, ``H = V Vᵀ`` with V upper triangular, and V inverted.

    Args:
        hessian: ``fp32 [in, in]``, finite, without columns of zeros.
        damp_percent: what the diagonal is raised by at first, as a fraction of its mean.
    """
    wide = torch.float64 if hessian.shape[0] <= _WIDEST_DOUBLE and hessian.device.type != "mps" else torch.float32
    diagonal = hessian.diagonal()
    mean = float(diagonal.double().mean()) if hessian.device.type != "mps" else float(diagonal.mean())
    damp, attempts = damp_percent, 0
    while damp <= _MOST_DAMP and mean > 0:
        attempts += 1
        upper = _inverse_factor(hessian, damp * mean, wide)
        if upper is not None:
            return Factor(upper, damp, attempts)
        damp = max(damp * _RAISE, _LEAST_DAMP)
    safe = diagonal.clamp(min=0) + (mean if mean > 0 else 1.0) * max(damp_percent, _LEAST_DAMP)
    return Factor(torch.diag(safe.rsqrt()), 0.0, attempts, usable=False)


def _inverse_factor(hessian: Tensor, damp: float, dtype: torch.dtype) -> Tensor | None:
    reversed_ = hessian.flip(0, 1).to(dtype)
    reversed_.diagonal().add_(damp)
    factor, failed = torch.linalg.cholesky_ex(reversed_)
    if int(failed):
        return None
    del reversed_
    factor = factor.flip(0, 1)
    # Of a wide layer each of these matrices takes gigabytes, so the solution takes the identity's place; it has to be
    # column-major for that.
    inverse = torch.eye(len(hessian), dtype=dtype, device=hessian.device).t()
    torch.linalg.solve_triangular(factor, inverse, upper=True, out=inverse)
    del factor
    upper = inverse.float()
    del inverse
    return upper if bool(torch.isfinite(upper).all()) else None


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 matrices in fp32: no TF32, no bf16, whatever was set before; restored on the way out."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
