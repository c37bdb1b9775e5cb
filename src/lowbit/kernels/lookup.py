"""The operator of packed embeddings: rows of a weight, dequantized one by one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbit.core import QuantSpec
from lowbit.core.rows import dequantize_rows

_library = torch.library.Library("lowbit", "FRAGMENT")
_library.define(
    "embedding(Tensor indices, Tensor[] weight, str spec, int out_features, int in_features, ScalarType dtype) "
    "-> Tensor"
)


def embedding(
    indices: Tensor, weight: list[Tensor], spec: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """``W[indices]``; not differentiable.

    Args:
        indices: integers of any shape.
        weight: the tensors of the spec's own layout, in its order.
        spec: :meth:`QuantSpec.to_json`.

    Returns:
        ``[*indices.shape, in]`` of `dtype`.
    """
    result: Tensor = torch.ops.lowbit.embedding(indices, weight, spec, out_features, in_features, dtype)
    return result


@functools.lru_cache(maxsize=256)
def _resolve(spec: str) -> tuple[QuantSpec, tuple[str, ...]]:
    parsed = QuantSpec.from_json(spec)
    return parsed, tuple(parsed.tensors((1, 1)))


def _embedding(
    indices: Tensor, weight: list[Tensor], spec: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    parsed, names = _resolve(spec)
    tensors = dict(zip(names, weight, strict=True))
    rows = dequantize_rows(parsed, tensors, (out_features, in_features), indices.reshape(-1), dtype)
    return rows.view(*indices.shape, in_features)


def _embedding_fake(
    indices: Tensor, weight: list[Tensor], spec: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return weight[0].new_empty(*indices.shape, in_features, dtype=dtype)


_library.impl("embedding", _embedding, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::embedding", _embedding_fake, lib=_library)
