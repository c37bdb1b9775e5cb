"""`QuantEmbedding`: a packed table of embeddings, and the output head that is tied to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import PlanError
from lowbit.kernels import lookup, ops
from lowbit.nn.linear import CANONICAL, QuantLinear
from lowbit.nn.packed import PackedModule


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` is a table of embeddings that can be packed: torch's own, or Gemma's, which scales its rows."""
    if type(module) is nn.Embedding:
        return module.max_norm is None
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and isinstance(module, nn.Embedding)
    return scaled and isinstance(getattr(module, "scalar_embed_scale", None), int | float)


class QuantEmbedding(PackedModule, nn.Embedding):
    """Looks up rows of a packed weight and dequantizes only those; stays in the spec's own layout.

    Args:
        spec: what the weight means.
        shape: ``(number of rows, size of a row)``.
        padding_idx: kept for those who ask.
        scale: a number that every row is multiplied with (Gemma), or None.
        dtype: of the rows; casting the module changes it.
    """

    cast: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        *,
        padding_idx: int | None = None,
        scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx, self.scalar_embed_scale = padding_idx, scale
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.dense_class: type[nn.Embedding] = nn.Embedding
        # An empty tensor that casts go through.
        self.register_buffer("cast", torch.empty(0, dtype=dtype or spec.dtype), persistent=False)
        self.allocate(spec)

    @classmethod
    def in_place_of(cls, dense: nn.Embedding, spec: QuantSpec, dtype: torch.dtype) -> QuantEmbedding:
        """An empty packed table of the same shape and scale as `dense`."""
        layer = cls(
            spec,
            (dense.num_embeddings, dense.embedding_dim),
            padding_idx=dense.padding_idx,
            scale=getattr(dense, "scalar_embed_scale", None),
            dtype=dtype,
        )
        layer.dense_class = type(dense)
        return layer

    @classmethod
    def from_tensor(cls, tensor: QuantTensor, *, dtype: torch.dtype | None = None) -> QuantEmbedding:
        """A table around a quantized weight, on the weight's device."""
        layer = cls(tensor.spec, tensor.shape, dtype=dtype)
        layer._place(dict(tensor.tensors))
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.cast.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense table, made anew each time; writing to it changes nothing."""
        return ops.dequantize(
            self.packed, self.spec_key, CANONICAL, self.num_embeddings, self.embedding_dim, self.dense_dtype
        )

    def allocate(self, spec: QuantSpec) -> None:
        """Become an empty table of `spec` on the meta device; tensors are placed later."""
        self.spec, self.spec_key = spec, spec.to_json()
        layout = spec.tensors(self.shape)
        self._place({name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()})

    def quant_tensor(self) -> QuantTensor:
        """The weight as it is stored."""
        layout = self.spec.tensors(self.shape)
        # Training set-ups cast every half-precision parameter to fp32; that loses nothing and is undone here.
        tensors = {
            name: tensor.detach().to(layout[name][1]) for name, tensor in zip(self._names, self.packed, strict=True)
        }
        return QuantTensor(self.spec, tensors, self.shape)

    def forward(self, indices: Tensor) -> Tensor:
        rows = lookup.embedding(
            indices, self.packed, self.spec_key, self.num_embeddings, self.embedding_dim, self.dense_dtype
        )
        if self.scalar_embed_scale is None:
            return rows
        return rows * torch.full((), self.scalar_embed_scale, device=rows.device).to(rows.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The table that this one stands for, dequantized."""
        scale = {} if self.scalar_embed_scale is None else {"embed_scale": self.scalar_embed_scale}
        arguments: dict[str, Any] = {"padding_idx": self.padding_idx, **scale}
        table = self.dense_class(self.num_embeddings, 1, **arguments)
        table.embedding_dim = self.embedding_dim
        table.weight = nn.Parameter(self.weight.to(dtype or self.dense_dtype), requires_grad=False)
        return table.to(self.packed[0].device).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError("the weight of a QuantEmbedding is packed; replace the layer to change it")
        super().__setattr__(name, value)


class TiedHead(QuantLinear):
    """An output head that multiplies with the packed table of an embedding; it has no weight of its own.

    Args:
        table: the embedding; moves and dtypes are its own affair.
        bias: ``[rows of the table]`` or None.
    """

    def __init__(self, table: QuantEmbedding, *, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self._tables = [table]  # in a list, so that the table doesn't become a part of this module
        self.out_features, self.in_features = table.shape
        self.compute_dtype: torch.dtype | None = None
        self.register_parameter("bias", bias)

    @property
    def table(self) -> QuantEmbedding:
        return self._tables[0]

    @property
    def packed(self) -> list[Tensor]:
        return self.table.packed

    @property
    def packed_names(self) -> tuple[str, ...]:
        """None: nothing of the weight is this module's."""
        return ()

    @property
    def spec(self) -> QuantSpec:  # type: ignore[override]
        return self.table.spec

    @property
    def spec_key(self) -> str:  # type: ignore[override]
        return self.table.spec_key

    @property
    def dense_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.table.dense_dtype

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return CANONICAL

    def allocate(self, spec: QuantSpec) -> None:
        raise PlanError("a tied head has no weight of its own")

    def requantize(self, weight: Tensor) -> None:
        raise PlanError("the head is tied to the embedding: changing it would change both; untie them first")

    def quant_tensor(self) -> QuantTensor:
        return self.table.quant_tensor()

    def select_kernel(self, name: str | None = None) -> None:
        """The table stays in its own layout, which serves both."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.packed[0].is_meta:
            raise PlanError("the embedding that the head is tied to is offloaded; keep it on a device")
        device = self.packed[0].device
        return super().forward(inputs.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TiedHead:
        nn.Module._apply(self, fn, recurse)
        return self
