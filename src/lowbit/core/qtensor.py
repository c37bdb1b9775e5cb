"""`QuantTensor`: a spec, its plain tensors, and the logical shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core import reference
from lowbit.core.spec import QuantSpec
from lowbit.errors import FormatError


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A quantized weight ``[out, in]``.

    Attributes:
        spec: what the numbers mean.
        tensors: the numbers, by the names of :meth:`QuantSpec.tensors`.
        shape: logical ``(out, in)``.
    """

    spec: QuantSpec
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]

    def validate(self) -> QuantTensor:
        """Check names, shapes, dtypes and index ranges once, where bytes enter the program; returns self.

        Raises:
            FormatError: names the tensor, what was found and what was expected.
        """
        if min(self.shape) <= 0:
            raise FormatError("a weight has rows and columns", found=list(self.shape))
        layout = self.spec.tensors(self.shape)
        if set(layout) != set(self.tensors):
            raise FormatError("tensors don't match the spec", found=sorted(self.tensors), expected=sorted(layout))
        for name, (shape, dtype) in layout.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape:
                raise FormatError("wrong shape", tensor=name, found=list(tensor.shape), expected=list(shape))
            if tensor.dtype != dtype:
                raise FormatError("wrong dtype", tensor=name, found=tensor.dtype, expected=dtype)
        self._check_group_index()
        return self

    def _check_group_index(self) -> None:
        index = self.tensors.get("group_index")
        if index is None or index.is_meta or index.numel() == 0:
            return
        groups = self.spec.grouping.counts(self.shape)[-1]
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise FormatError(
                "a column's group is out of range",
                tensor="group_index",
                found=f"{low}..{high}",
                expected=f"0..{groups - 1}",
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold, scales, zeros and tables included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """``8 * nbytes / (out * in)``: counted from the tensors, not from the name of the format."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        return self.tensors["codes"].device

    def to(self, device: torch.device | str) -> QuantTensor:
        return QuantTensor(self.spec, {name: tensor.to(device) for name, tensor in self.tensors.items()}, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[out, in]``.

        In the dtype that the format's own library dequantizes to (``spec.dtype``), the result has that library's bits.
        """
        return reference.dequantize(self.spec, self.tensors, self.shape, dtype)

    def equal(self, other: QuantTensor) -> bool:
        """Whether spec, shape and every tensor are the same to the bit."""
        return (
            self.spec == other.spec
            and self.shape == other.shape
            and all(_same_bits(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
        )

    def __repr__(self) -> str:
        return f"QuantTensor({self.spec}, shape={self.shape}, {self.bits_per_weight:.3f} bits per weight)"


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_raw(left), _raw(right))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
