"""Packed embeddings in a Transformers model, and the heads that are tied to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit.core import QuantSpec
from lowbit.integrations.accelerate import hand_over_hooks, is_offloaded, on_host
from lowbit.nn.embedding import QuantEmbedding, TiedHead


def put_table(model: Any, name: str, spec: QuantSpec, dtype: torch.dtype) -> QuantEmbedding:
    """Replace the embedding `name` by a packed one, and every head that is tied to it by one that shares its table.

    Transformers ties parameters, and there are none left to tie, so the model forgets these ties.
    """
    table = QuantEmbedding.in_place_of(model.get_submodule(name), spec, dtype)
    model.set_submodule(name, table)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target in [target for target, source in ties.items() if source == f"{name}.weight"]:
        module = target.removesuffix(".weight")
        dense = model.get_submodule(module)
        bias = dense.bias if isinstance(getattr(dense, "bias", None), nn.Parameter) else None
        head = TiedHead(table, bias=bias)
        head._is_hf_initialized = True  # else Transformers draws random numbers into a dense copy of the table
        model.set_submodule(module, head)
        del ties[target]
        declared = dict(getattr(model, "_tied_weights_keys", None) or {})
        declared.pop(target, None)
        model._tied_weights_keys = declared
    return table


def dequantize_tables(model: Any, dtype: torch.dtype | None) -> None:
    """Replace packed embeddings by dense ones, and tied heads by dense heads that share their weight again."""
    names = {table: name for name, table in model.named_modules() if isinstance(table, QuantEmbedding)}
    heads = [(name, head) for name, head in model.named_modules() if isinstance(head, TiedHead)]
    made: dict[QuantEmbedding, nn.Embedding] = {}
    for table, name in names.items():
        offloaded = is_offloaded(table)
        with on_host(table):
            made[table] = table.dense(dtype)
        hand_over_hooks(table, made[table], offloaded=offloaded)
        model.set_submodule(name, made[table])
    for name, head in heads:
        dense = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        dense.weight = made[head.table].weight
        if head.bias is not None:
            dense.bias = head.bias
        model.set_submodule(name, dense.train(head.training))
        tie = {f"{name}.weight": f"{names[head.table]}.weight"}
        model.all_tied_weights_keys |= tie
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tie}
