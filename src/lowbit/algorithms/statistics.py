"""What was measured of the inputs of a linear layer; calibrated algorithms choose numbers by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

HESSIAN: Final = "hessian"
DEVIATION: Final = "deviation"
SQUARES: Final = "squares"
MAGNITUDES: Final = "magnitudes"


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

    def add(self, inputs: Tensor, dense_inputs: Tensor | None = None) -> None:
        """Count inputs ``[..., in]`` of any floating dtype; `dense_inputs` are those of the dense model.

        Raises:
            FloatingPointError: an input is NaN or infinite.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            raise FloatingPointError("the inputs of a layer are NaN or infinite")
        self.tokens += len(rows)
        if HESSIAN in self.needs:
            self._add(HESSIAN, rows.t() @ rows)
        if DEVIATION in self.needs and dense_inputs is not None:
            self._add(DEVIATION, (dense_inputs.detach().reshape(rows.shape).float() - rows).t() @ rows)
        if SQUARES in self.needs:
            self._add(SQUARES, rows.square().sum(0))
        if MAGNITUDES in self.needs:
            self._add(MAGNITUDES, rows.abs().sum(0))

    def _add(self, name: str, amount: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += amount
        else:
            self.sums[name] = amount

    def finish(self) -> Statistics:
        """The means of all that was added."""
        return Statistics(self.tokens, **{name: total / max(1, self.tokens) for name, total in self.sums.items()})
