"""What was measured of the inputs of a linear layer; calibrated algorithms choose numbers by it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from lowbit.algorithms.factor import full_precision

HESSIAN: Final = "hessian"
DEVIATION: Final = "deviation"
SQUARES: Final = "squares"
MAGNITUDES: Final = "magnitudes"
_NOT_FINITE: Final = "the inputs of a layer are NaN or infinite"


@dataclass
class Statistics:
    """Means over the calibration tokens ``x [in]`` that a linear layer has seen; None where nobody asked for them.

    Attributes:
        tokens: how many there were; an expert may have seen few, or none.
        hessian: ``fp32 [in, in]``, the mean of ``x xᵀ``: half the Hessian of the squared output error per output row.
        deviation: ``fp32 [in, in]``, the mean of ``(x' - x) xᵀ``, where x' is what the layer sees in the dense model
            and x what it sees behind the layers that are quantized already (GPTAQ, arXiv:2504.02692).
        squares: ``fp32 [in]``, the mean of ``x²``; the diagonal of the Hessian, and llama.cpp's importance matrix.
        magnitudes: ``fp32 [in]``, the mean of ``|x|`` (AWQ).
    """

    tokens: int = 0
    hessian: Tensor | None = None
    deviation: Tensor | None = None
    squares: Tensor | None = None
    magnitudes: Tensor | None = None

    def importance(self) -> Tensor | None:
        """``fp32 [in]``: the mean of ``x²``, from whichever statistic says it."""
        if self.squares is not None:
            return self.squares
        return None if self.hessian is None else self.hessian.diagonal()


@dataclass
class Collector:
    """Sums up :class:`Statistics` over batches of inputs.

    Args:
        needs: which statistics, by the names of the attributes of :class:`Statistics`.
    """

    needs: frozenset[str]
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    _finite: Tensor | None = None

    def add(self, inputs: Tensor, dense_inputs: Tensor | None = None) -> None:
        """Count inputs ``[..., in]`` of any floating dtype; `dense_inputs` are those of the dense model.

        Raises:
            FloatingPointError: an input is NaN or infinite. On a GPU, which is not waited for, :meth:`check` raises it.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._look(rows)
        self.tokens += len(rows)
        # TF32 holds 16-bit numbers, and their products are added in fp32.
        with nullcontext() if inputs.element_size() <= 2 else full_precision():
            if HESSIAN in self.needs:
                self._add_product(HESSIAN, rows, rows)
            if DEVIATION in self.needs and dense_inputs is not None:
                self._add_product(DEVIATION, dense_inputs.detach().reshape(rows.shape).float() - rows, rows)
        if SQUARES in self.needs:
            self._add(SQUARES, rows.square().sum(0))
        if MAGNITUDES in self.needs:
            self._add(MAGNITUDES, rows.abs().sum(0))

    def check(self) -> None:
        """Wait for what was added.

        Raises:
            FloatingPointError: an input was NaN or infinite, or so large that sums are.
        """
        if self._finite is not None and not bool(self._finite):
            raise FloatingPointError(_NOT_FINITE)

    def _look(self, rows: Tensor) -> None:
        if rows.is_cuda:
            finite = torch.isfinite(rows.sum())
            self._finite = finite if self._finite is None else self._finite & finite
        elif not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            raise FloatingPointError(_NOT_FINITE)

    def _add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """In place: of wide layers a second matrix would fill a GPU."""
        if name in self.sums:
            self.sums[name].addmm_(left.t(), right)
        else:
            self.sums[name] = left.t() @ right

    def _add(self, name: str, amount: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += amount
        else:
            self.sums[name] = amount

    def finish(self) -> Statistics:
        """The means of all that was added.

        Raises:
            FloatingPointError: as :meth:`check`.
        """
        self.check()
        return Statistics(self.tokens, **{name: total / max(1, self.tokens) for name, total in self.sums.items()})
