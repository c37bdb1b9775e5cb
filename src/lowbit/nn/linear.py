"""`QuantLinear`: the one quantized linear layer, for every format and every kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.algorithms import quantize
from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import PlanError
from lowbit.kernels import Problem, kernel_named, ops, select
from lowbit.nn.packed import PackedModule, working_dtype

CANONICAL = "torch"  # the kernel whose layout is the spec's own


class PackedWeight(Tensor):
    """A dense copy of a packed weight; assigning to ``data`` quantizes anew what is assigned.

    Adapters are merged by ``layer.weight.data += delta``, in PEFT and elsewhere. On a plain copy that would be lost
    without a word. Results of any operation are plain tensors.
    """

    _layer: QuantLinear
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._layer.requantize(value)


class QuantLinear(PackedModule, nn.Linear):
    """``inputs @ W.T + bias`` with a packed weight.

    It is an ``nn.Linear`` for everyone who asks (PEFT adapts it as it is), but has no ``weight`` parameter: the packed
    tensors are plain parameters without gradient, named as the kernel's layout names them, so that placement,
    offloading and `state_dict` work as on any module. Casting the module casts only the bias; codes and scales keep
    their dtypes.

    Args:
        spec: what the weight means.
        shape: logical ``(out, in)``.
        bias: ``[out]`` or None.
        compute_dtype: what inputs are cast to for the product (bitsandbytes' compute dtype); None for the inputs' own.
        dtype: of the dense ``weight`` that others see.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        *,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.compute_dtype = compute_dtype
        self.dense_dtype = dtype or spec.dtype
        self.kernel = CANONICAL
        self.register_parameter("bias", bias)
        self.allocate(spec)

    @classmethod
    def from_tensor(
        cls,
        tensor: QuantTensor,
        *,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """A layer around a quantized weight, on the weight's device, with the best kernel there."""
        layer = cls(tensor.spec, tensor.shape, bias=bias, compute_dtype=compute_dtype, dtype=dtype)
        layer._place(dict(tensor.tensors))
        layer.select_kernel()
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight ``[out, in]``, made anew each time; assigning to its ``data`` is :meth:`requantize`."""
        dense = self.dequantize(self.dense_dtype)
        if torch.compiler.is_compiling():
            return dense
        weight = dense.as_subclass(PackedWeight)
        weight._layer = self
        return weight

    def allocate(self, spec: QuantSpec) -> None:
        """Become an empty layer of `spec` on the meta device; tensors are placed later."""
        self.spec, self.spec_key, self.kernel = spec, spec.to_json(), CANONICAL
        layout = spec.tensors(self.shape)
        self._place({name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()})

    def quant_tensor(self) -> QuantTensor:
        """The weight in the spec's own layout, whatever the kernel."""
        declared = {name: dtype for name, (_, dtype) in kernel_named(self.kernel).layout(self.spec, self.shape).items()}
        # Training set-ups cast every half-precision parameter to fp32; that loses nothing and is undone here.
        tensors = {
            name: tensor.detach().to(declared[name]) for name, tensor in zip(self._names, self.packed, strict=True)
        }
        return kernel_named(self.kernel).restore(self.spec, self.shape, tensors)

    def requantize(self, weight: Tensor) -> None:
        """Put another dense weight ``[out, in]`` in this one's place, quantized without calibration to the same spec.

        Raises:
            PlanError: no algorithm without calibration produces the spec; dequantize the layer instead.
        """
        if tuple(weight.shape) != self.shape:
            raise PlanError(f"a weight of {list(self.shape)} can't become one of {list(weight.shape)}")
        try:
            tensor = quantize(weight.detach().to(self.packed[0].device), self.spec)
        except PlanError as error:
            raise PlanError(f"{error}: dequantize the model before changing its weights") from error
        kernel = self.kernel
        self.kernel = CANONICAL
        self._place(dict(tensor.tensors))
        self.select_kernel(kernel)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(self.packed, self.spec_key, self.kernel, self.out_features, self.in_features, dtype)

    def select_kernel(self, name: str | None = None) -> None:
        """Bring the weight into the layout of the kernel `name`, by default of the best one for its device."""
        device = self.packed[0].device
        if device.type == "meta":
            return
        if name is None:
            problem = Problem(self.spec, self.shape, device.type, self.compute_dtype or self.dense_dtype)
            name = select(problem).name
        if name != self.kernel:
            tensors = kernel_named(name).prepare(self.quant_tensor())
            self.kernel = name
            self._place(tensors)

    def forward(self, inputs: Tensor) -> Tensor:
        dtype = working_dtype(inputs)
        compute = self.compute_dtype or dtype
        bias = None if self.bias is None else self.bias.to(compute)
        outputs = ops.linear(inputs.to(compute), self.packed, bias, self.spec_key, self.kernel, self.out_features)
        return outputs.to(dtype)

    def extra_repr(self) -> str:
        bias = ", bias" if self.bias is not None else ""
        return f"{self.in_features} -> {self.out_features}{bias}, {self.spec}, {self.kernel} kernel"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError("the weight of a QuantLinear is packed; replace the layer to change it")
        super().__setattr__(name, value)
