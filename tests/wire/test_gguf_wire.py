"""GGUF's blocks as a wire, names and rows of its tensors, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.core import IntCode, QuantSpec, Scale, Zero, integer_spec, table_spec
from lowbit.core.spec import Grouping
from lowbit.errors import FormatError
from lowbit.wire import open_checkpoint
from lowbit.wire.gguf.architectures import ARCHITECTURES, Architecture
from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles
from lowbit.wire.gguf.codec import spec_of
from lowbit.wire.gguf.config import config_of, shortest
from lowbit.wire.gguf.metadata import metadata_of
from lowbit.wire.gguf.names import Rows, architecture_for, to_gguf, to_transformers
from lowbit.wire.gguf.types import GgmlType
from lowbit.wire.gguf.wire import TYPES_KEY, GgufSettings, GgufWire, nearest_type
from lowbit.wire.gguf.writer import Entry, write_gguf

WIRE = GgufWire()
BLOCKS = [kind for kind in GgmlType if not kind.dense]
ROWS = {row.model_type + (row.marker or ""): row for row in ARCHITECTURES}


def blocks(kind: GgmlType, rows: int = 4) -> torch.Tensor:
    torch.manual_seed(int(kind))
    return torch.randint(0, 60, (rows, kind.row_bytes(512)), dtype=torch.uint8)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_read_and_write_are_inverse(kind: GgmlType) -> None:
    raw, settings = blocks(kind), GgufSettings(type=kind)
    tensor = WIRE.read(settings, {"gguf": raw})
    assert tensor.shape == (4, 512) and torch.equal(WIRE.write(settings, tensor)["gguf"], raw)
    assert WIRE.read(settings, WIRE.write(settings, tensor)).equal(tensor)
    # Rows may come as a view with more axes, and never keep the file's memory alive.
    again = WIRE.read(settings, {"gguf": raw.unflatten(0, (2, 2))})
    assert again.equal(tensor) and again.tensors["codes"].data_ptr() != raw.data_ptr()
    assert WIRE.settings_for(tensor.spec).type is kind and WIRE.spelling(settings, tensor.spec) == spec_of(kind)
    assert WIRE.refusal(settings, tensor.spec, (4, 512)) is None
    assert "whole number" in str(WIRE.refusal(settings, tensor.spec, (4, 500)))


def test_types_in_the_header() -> None:
    types = {"a.b": GgmlType.Q4_K, "a.c": GgmlType.Q6_K, "d": GgmlType.Q4_K}
    joined = WIRE.join({module: GgufSettings(type=kind) for module, kind in types.items()}, ())
    specs: dict[str, tuple[QuantSpec, tuple[int, int]]] = {
        module: (spec_of(kind), (4, 512)) for module, kind in types.items()
    }
    bound = WIRE.bind(WIRE.parse(WIRE.config(GgufSettings("Q4_K_M"))), WIRE.metadata(joined, specs, ()))
    assert bound.label == "Q4_K_M" and bound.types == joined.types == types
    assert WIRE.spec(WIRE.of(bound, "a.c")) == spec_of(GgmlType.Q6_K)
    with pytest.raises(FormatError, match="nothing says of which type"):
        WIRE.spec(WIRE.of(bound, "e"))


def test_what_was_skipped_is_known() -> None:
    settings = GgufSettings("Q4_K_M", ("lm_head", "*.k_proj"))
    assert WIRE.parse(WIRE.config(settings)) == settings
    for wrong in ("lm_head", [3], {"lm_head": 1}):
        with pytest.raises(FormatError, match="modules_to_not_convert is not a list of names"):
            WIRE.parse({"quant_method": "gguf", "modules_to_not_convert": wrong})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"Q9": ["a"]}', '{"F16": ["a"]}', '{"Q4_K": "a"}', '{"Q4_K": [1]}', '{"Q4_K": ["a", "a"]}']
)
def test_broken_types_in_the_header(text: str) -> None:
    with pytest.raises(FormatError, match="gguf.types"):
        WIRE.bind(GgufSettings(), {TYPES_KEY: text})


def test_tensors_that_are_no_blocks() -> None:
    settings = GgufSettings(type=GgmlType.Q4_K)
    for broken in ({}, {"gguf": blocks(GgmlType.Q4_K).float()}, {"gguf": blocks(GgmlType.Q6_K)}):
        with pytest.raises(FormatError):
            WIRE.read(settings, broken)
    tensor = WIRE.read(settings, {"gguf": blocks(GgmlType.Q4_K)})
    with pytest.raises(FormatError, match="another type"):
        WIRE.write(GgufSettings(type=GgmlType.Q6_K), tensor)
    with pytest.raises(FormatError, match="type has the wrong type"):
        WIRE.parse({"quant_method": "gguf", "type": 4})


def test_the_type_nearest_to_other_formats() -> None:
    for bits, kind in ((3, GgmlType.Q4_0), (4, GgmlType.Q4_0), (5, GgmlType.Q5_0), (8, GgmlType.Q8_0)):
        symmetric = QuantSpec(IntCode(bits, signed=True), Scale(torch.float16), Grouping.groups(64))
        assert nearest_type(symmetric) is kind
    assert nearest_type(integer_spec(4, 128)) is GgmlType.Q8_0  # differences from zero points take a bit more
    floats = QuantSpec(IntCode(5), Scale(torch.float16), Grouping.groups(64), Zero("float"))
    assert nearest_type(floats) is GgmlType.Q5_1
    for spec in (table_spec("nf4", block_size=64), QuantSpec(IntCode(8), floats.scale, floats.grouping, floats.zero)):
        with pytest.raises(FormatError, match="GGUF has no type"):
            nearest_type(spec)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_names_go_both_ways(row: Architecture) -> None:
    """No two modules share a name, and every name leads back."""
    assert len(set(row.modules.values())) == len(row.modules)
    for pattern in row.modules:
        name = f"{pattern.replace('{n}', '12')}.weight"
        found = to_transformers(row, name)
        assert found is not None
        assert to_gguf(row, found.replace("{e}", "3")) == (name, 3 if "{e}" in found else None)
    assert to_transformers(row, "blk.0.other.weight") is None and to_gguf(row, "model.other.weight") is None


def test_rows_are_a_permutation_and_its_inverse() -> None:
    llama = Rows(architecture_for({"model_type": "llama"}), 4, 2)
    falcon = Rows(architecture_for({"model_type": "falcon", "new_decoder_architecture": True}), 4, 2)
    weight = torch.arange(64 * 3).view(64, 3)
    for rows, name in ((llama, "blk.0.attn_q.weight"), (llama, "blk.0.attn_k.bias"), (falcon, "blk.1.attn_qkv.weight")):
        stored = rows.apply(name, weight)
        assert not torch.equal(stored, weight)
        assert torch.equal(rows.undo(name, stored).reshape(64, 3), weight)
    assert llama.apply("blk.0.attn_v.weight", weight) is weight
    # The first head of 16 rows: its halves interleaved.
    assert llama.apply("blk.0.attn_q.weight", weight)[:4, 0].tolist() == [0, 24, 3, 27]
    with pytest.raises(FormatError, match="heads"):
        llama.undo("blk.0.attn_q.weight", weight[:60])


def test_decimals_are_the_shortest() -> None:
    assert shortest(torch.tensor(1e-5).item()) == 1e-5 and shortest(10000.0) == 10000.0
    assert shortest(1e300) == 1e300 and shortest(0.0) == 0.0


CONFIG: dict[str, Any] = {
    "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 32, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_activation": "silu"}, {"query_pre_attn_scalar": 256}, {"layer_types": ["full_attention"] * 2},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, {"attention_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_models_that_llama_cpp_computes_otherwise(change: dict[str, Any]) -> None:
    row = architecture_for(CONFIG)
    metadata, tensors = metadata_of(row, CONFIG)
    assert metadata["gemma2.rope.dimension_count"] == 32 and not tensors
    with pytest.raises(FormatError, match="llama.cpp"):
        metadata_of(row, CONFIG | change)


def test_unknown_models() -> None:
    with pytest.raises(FormatError, match="not supported"):
        architecture_for({"model_type": "vit"})


def file_with(folder: Path, entries: list[Entry], **changes: Any) -> Path:
    """A Qwen2 file of one block."""
    metadata = {
        "general.architecture": "qwen2", "qwen2.block_count": 1, "qwen2.embedding_length": 32,
        "qwen2.attention.head_count": 2,
    }  # fmt: skip
    base = [Entry("token_embd.weight", (4, 32), GgmlType.Q8_0, lambda: bytes(136))]
    write_gguf(folder / "x.gguf", metadata | changes, base + entries)
    return folder / "x.gguf"


def entry(name: str, shape: tuple[int, ...], kind: GgmlType = GgmlType.F32) -> Entry:
    size = kind.row_bytes(shape[-1]) * torch.Size(shape[:-1]).numel()
    return Entry(name, shape, kind, lambda: bytes(size))


def test_tensors_under_their_names(tmp_path: Path) -> None:
    file = file_with(tmp_path, [entry("blk.0.attn_norm.weight", (32,)), entry("blk.0.ffn_up.weight", (8, 32))])
    files = GgufCheckpointFiles(file)
    assert files.names() == [
        "model.embed_tokens.gguf", "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight",
    ]  # fmt: skip
    assert files.layout("model.embed_tokens.gguf") == ((4, 34), "U8")
    assert files.layout("model.layers.0.mlp.up_proj.weight") == ((8, 32), "F32")
    lazy = files.loadable()["model.embed_tokens.gguf"]
    assert lazy.get_dtype() == "U8" and lazy.get_shape() == [4, 34] and lazy[...].shape == (4, 34)
    assert files.file_of("model.embed_tokens.gguf") == file and files.config == config_of(files.file)
    assert list(open_checkpoint(file).weights) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (entry("blk.0.attn_sinks.weight", (4,)), "no such tensor"),
        (entry("blk.0.attn_norm.weight", (32,), GgmlType.Q8_0), "only matrices"),
        (entry("blk.3.attn_norm.weight", (32,)), "the blocks that have tensors"),
    ],
)
def test_tensors_that_belong_to_no_model(broken: Entry, words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        GgufCheckpointFiles(file_with(tmp_path, [entry("blk.0.ffn_up.weight", (8, 32)), broken]))
    assert caught.value.file == str(tmp_path / "x.gguf")


def test_experts_of_another_number(tmp_path: Path) -> None:
    stacks = [entry("blk.0.ffn_gate_exps.weight", (3, 8, 32)), entry("blk.0.attn_norm.weight", (32,))]
    metadata = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 32,
        "llama.attention.head_count": 2, "llama.expert_count": 4,
    }  # fmt: skip
    with pytest.raises(FormatError, match="each expert"):
        GgufCheckpointFiles(file_with(tmp_path, stacks, **metadata))


def test_files_of_plain_numbers_are_not_quantized(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "x.gguf",
        {"general.architecture": "qwen2", "qwen2.block_count": 1, "qwen2.embedding_length": 32,
         "qwen2.attention.head_count": 2},
        [entry("token_embd.weight", (4, 32)), entry("blk.0.ffn_up.weight", (8, 32))],
    )  # fmt: skip
    with pytest.raises(FormatError, match="not quantized"):
        open_checkpoint(tmp_path / "x.gguf")
