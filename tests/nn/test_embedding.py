"""Packed embeddings look up what the dense table holds; a tied head multiplies with the same storage."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lowbit.core import IntCode, QuantSpec, QuantTensor, Scale, VectorCode, Zero
from lowbit.core.rows import can_select_rows
from lowbit.core.spec import Grouping
from lowbit.errors import PlanError
from lowbit.nn.embedding import QuantEmbedding, TiedHead, is_embedding
from lowbit.wire.gguf.codec import read_blocks
from lowbit.wire.gguf.types import GgmlType

SHAPE = (24, 512)
KINDS = [GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q8_0, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.IQ4_XS, GgmlType.TQ2_0]


def weight(kind: GgmlType) -> QuantTensor:
    """Random blocks with finite scales."""
    torch.manual_seed(int(kind))
    raw = torch.randint(0, 60, (SHAPE[0], kind.row_bytes(SHAPE[1])), dtype=torch.uint8)
    return read_blocks(kind, raw, SHAPE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_lookup_equals_the_dense_table(kind: GgmlType) -> None:
    table = QuantEmbedding.from_tensor(weight(kind))
    assert can_select_rows(table.spec, SHAPE)
    indices = torch.tensor([[3, 0, 23], [3, 7, 1]])
    assert torch.equal(table(indices), table.weight[indices])
    assert torch.equal(table(indices), table.dense()(indices))
    assert table(indices[:, :0]).shape == (2, 0, 512)


def test_rows_that_share_scales_are_dequantized_together() -> None:
    spec = QuantSpec(IntCode(8, signed=True), Scale(torch.float32), Grouping.per_tensor(), dtype=torch.float32)
    tensors = {"codes": torch.arange(24, dtype=torch.int8).view(6, 4), "scales": torch.full((1, 1), 0.5)}
    table = QuantEmbedding.from_tensor(QuantTensor(spec, tensors, (6, 4)).validate())
    assert not can_select_rows(spec, (6, 4))
    assert torch.equal(table(torch.tensor([5, 1])), table.weight[[5, 1]])


def test_rows_of_other_specs() -> None:
    vectors = QuantSpec(VectorCode(1, 8, 2, 4), Scale(torch.float16), Grouping(rows=2, cols=0))
    assert not can_select_rows(vectors, (8, 8))
    channel = QuantSpec(IntCode(4), Scale(torch.float16), Grouping.per_channel(), Zero("integer", 4))
    assert can_select_rows(channel, (8, 8))
    assert not can_select_rows(weight(GgmlType.Q4_K).spec, (8, 96))  # a super-scale would span rows


def test_casting_changes_the_rows_and_not_the_codes() -> None:
    table = QuantEmbedding.from_tensor(weight(GgmlType.Q4_K))
    before = [tensor.clone() for tensor in table.packed]
    table.half()
    assert table(torch.tensor([1])).dtype == torch.float16
    assert all(torch.equal(old, new) for old, new in zip(before, table.packed, strict=True))
    assert table.quant_tensor().equal(weight(GgmlType.Q4_K))


def test_a_tied_head_has_no_weight_of_its_own() -> None:
    table = QuantEmbedding.from_tensor(weight(GgmlType.Q6_K))
    model = nn.ModuleDict({"table": table, "head": TiedHead(table)})
    inputs = torch.randn(2, 512)
    torch.testing.assert_close(model["head"](inputs), inputs @ table.weight.t())
    assert not [name for name in model.state_dict() if name.startswith("head")]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other["head"].table is other["table"] and other["table"] is not table
        assert torch.equal(other["head"](inputs), model["head"](inputs))
    model.to(torch.bfloat16)
    assert model["head"](inputs.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(PlanError, match="tied"):
        model["head"].requantize(torch.zeros(SHAPE))


def test_the_operator_compiles_without_breaks() -> None:
    table = QuantEmbedding.from_tensor(weight(GgmlType.Q4_K))
    indices = torch.tensor([4, 2])
    compiled = torch.compile(table, fullgraph=True, backend="eager")
    assert torch.equal(compiled(indices), table(indices))
    arguments = (indices, table.packed, table.spec_key, *SHAPE, torch.float32)
    torch.library.opcheck(torch.ops.lowbit.embedding.default, arguments)


def test_scaled_tables() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    dense = Gemma3TextScaledWordEmbedding(24, 512, 0, embed_scale=22.6)
    assert is_embedding(dense) and is_embedding(nn.Embedding(2, 2)) and not is_embedding(nn.Linear(2, 2))
    assert not is_embedding(nn.Embedding(2, 2, max_norm=1.0))
    tensor = weight(GgmlType.Q8_0)
    table = QuantEmbedding.in_place_of(dense, tensor.spec, torch.bfloat16)
    table._place(dict(tensor.tensors))
    dense.weight = nn.Parameter(tensor.dequantize(torch.bfloat16))
    indices = torch.tensor([2, 9])
    assert torch.equal(table(indices), dense(indices))
    assert torch.equal(table.dense()(indices), dense(indices))
