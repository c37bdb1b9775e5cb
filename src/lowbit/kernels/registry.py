"""Which kernel runs which problem: an ordered list per device type; the first that fits is used."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.core import QuantSpec, QuantTensor
from lowbit.core.spec import TensorLayout
from lowbit.errors import KernelUnavailable


@dataclass(frozen=True)
class Problem:
    """A linear layer that wants a kernel.

    Attributes:
        shape: logical ``(out, in)`` of the weight.
        device: type of the device, ``cuda`` or ``cpu``.
        dtype: of the activations.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    device: str
    dtype: torch.dtype


class Kernel(abc.ABC):
    """One implementation of ``inputs @ W.T + bias``, with its own layout of the weight.

    `prepare` and `restore` are inverse to the bit, so that a running model can be saved without a second copy.

    Attributes:
        name: unique; a layer remembers its kernel by it.
        devices: the device types on which this kernel runs.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel can't run the problem, or None where it can."""

    @abc.abstractmethod
    def layout(self, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        """The tensors of :meth:`prepare` by name, each with shape and dtype."""

    @abc.abstractmethod
    def prepare(self, tensor: QuantTensor) -> dict[str, Tensor]:
        """The weight in this kernel's layout."""

    @abc.abstractmethod
    def restore(self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantTensor:
        """The inverse of :meth:`prepare`, on the device of the tensors."""

    @abc.abstractmethod
    def apply(
        self,
        inputs: Tensor,
        spec: QuantSpec,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """``inputs [..., in] @ W.T + bias``, ``[..., out]`` in the dtype of the inputs."""

    @abc.abstractmethod
    def dequantize(
        self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The dense weight ``[out, in]``, with the bits of :func:`lowbit.core.dequantize`."""


@functools.cache
def _registered() -> list[Kernel]:
    from lowbit.kernels.torch.kernel import TorchKernel
    from lowbit.kernels.triton.wna16 import Wna16Kernel

    return [Wna16Kernel(), TorchKernel()]


def register_kernel(kernel: Kernel) -> None:
    """Put a kernel before all others."""
    _registered().insert(0, kernel)


def unregister_kernel(name: str) -> None:
    """Take a kernel back; unknown names are ignored."""
    _registered()[:] = [kernel for kernel in _registered() if kernel.name != name]


def kernel_named(name: str) -> Kernel:
    """The kernel called `name`.

    Raises:
        KernelUnavailable: there is none.
    """
    for kernel in _registered():
        if kernel.name == name:
            return kernel
    raise KernelUnavailable(f"no kernel is called '{name}'; there are {[kernel.name for kernel in _registered()]}")


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """Every kernel in order of preference, with the reason why it can't run the problem, or None where it can."""
    return [(kernel.name, _refusal(kernel, problem)) for kernel in _registered()]


def select(problem: Problem) -> Kernel:
    """The first kernel that fits.

    Raises:
        KernelUnavailable: none does; the message holds every reason.
    """
    reasons = []
    for kernel in _registered():
        reason = _refusal(kernel, problem)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise KernelUnavailable(f"no kernel runs '{problem.spec}' on {problem.device}: {'; '.join(reasons)}")


def _refusal(kernel: Kernel, problem: Problem) -> str | None:
    if kernel.devices and problem.device not in kernel.devices:
        return f"runs on {' and '.join(kernel.devices)}, not on {problem.device}"
    return kernel.refusal(problem)
