"""Placeholder filled by the Triton kernel."""

from __future__ import annotations

from lowbit.kernels.registry import Problem
from lowbit.kernels.torch.kernel import TorchKernel


class Wna16Kernel(TorchKernel):
    name = "triton-wna16"
    devices = ("cuda",)

    def refusal(self, problem: Problem) -> str | None:
        return "not built yet"
