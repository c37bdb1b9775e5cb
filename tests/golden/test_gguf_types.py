"""GGUF's number types and container against the `gguf` package, and the quantizers against llama.cpp's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apart import require, run
from lowbit.algorithms import GgmlBlocks
from lowbit.core import BlockCode, QuantTensor
from lowbit.core.blocks import block_scales
from lowbit.core.ggml import GGML_SPECS
from lowbit.core.tables import E2M1, IQ4_NL, SIGN
from lowbit.errors import FormatError, PlanError
from lowbit.wire.gguf import (
    Entry,
    GgmlType,
    ModelFacts,
    Typed,
    ValueType,
    mixture,
    open_gguf,
    read_blocks,
    spec_of,
    type_of,
    write_blocks,
    write_gguf,
)

KINDS = [GgmlType[name] for name in GGML_SPECS]
QUANTIZED = [kind for kind in KINDS if not kind.dense]
TABLES = {"e2m1": E2M1, "iq4_nl": IQ4_NL, "sign": SIGN}
MADE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "F16", "BF16", "F32")
METADATA = {
    "general.architecture": "llama",
    "b.uint8": Typed(7, ValueType.UINT8),
    "b.int8": Typed(-7, ValueType.INT8),
    "b.uint16": Typed(7, ValueType.UINT16),
    "b.int16": Typed(-7, ValueType.INT16),
    "b.uint32": 7,
    "b.int32": -7,
    "b.uint64": 2**40,
    "b.int64": -(2**40),
    "b.float32": 0.25,
    "b.float64": Typed(0.1, ValueType.FLOAT64),
    "b.bool": False,
    "b.string": "Ġthe ▁",
    "b.strings": ["", "é"],
    "b.ints": [1, -1],
    "b.floats": [0.5, 1],
}


def random_weight(kind: GgmlType, shape: tuple[int, int]) -> QuantTensor:
    """Random bits for codes, scales and all; where a scale has to be finite, it is."""
    spec = spec_of(kind)
    tensors = {}
    for name, (sides, dtype) in spec.tensors(shape).items():
        if name == "table":
            tensors[name] = torch.tensor(TABLES[str(spec.code)])
        elif dtype in (torch.uint8, torch.int8):
            tensors[name] = torch.randint(0, 256, sides).to(torch.uint8).view(dtype)
        elif dtype.itemsize == 1:
            tensors[name] = torch.randint(0, 127 if dtype == torch.float8_e4m3fn else 250, sides).byte().view(dtype)
        else:
            tensors[name] = (torch.randn(sides) * torch.rand(sides)).to(dtype)
    if isinstance(spec.code, BlockCode):
        codes = tensors["codes"].flatten(0, 1)
        while bool((bad := ~torch.isfinite(block_scales(spec.code.name, codes.unsqueeze(0)).flatten())).any()):
            codes[bad] = torch.randint(0, 256, codes[bad].shape, dtype=torch.uint8)
    return QuantTensor(spec, tensors, shape)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_read_and_written_to_the_byte(kind: GgmlType) -> None:
    tensor = random_weight(kind, (37, 768))
    raw = write_blocks(kind, tensor)
    assert tuple(raw.shape) == (37, kind.row_bytes(768)) and raw.dtype == torch.uint8
    again = read_blocks(kind, raw, (37, 768))
    assert again.equal(tensor)
    assert torch.equal(write_blocks(kind, again), raw)
    assert type_of(again.spec) is kind
    assert again.spec == type(again.spec).from_json(again.spec.to_json())


def test_a_weight_in_several_chunks_is_the_same() -> None:
    tensor = random_weight(GgmlType.Q5_K, (2100, 1024))
    raw = write_blocks(GgmlType.Q5_K, tensor)
    assert torch.equal(raw[2050:], write_blocks(GgmlType.Q5_K, read_blocks(GgmlType.Q5_K, raw[2050:], (50, 1024))))
    assert read_blocks(GgmlType.Q5_K, raw, (2100, 1024)).equal(tensor)


def test_other_specs_are_refused() -> None:
    tensor = random_weight(GgmlType.Q4_0, (4, 64))
    with pytest.raises(FormatError, match="Q4_1 can't hold"):
        write_blocks(GgmlType.Q4_1, tensor)
    with pytest.raises(FormatError, match="multiple of 32"):
        write_blocks(GgmlType.Q4_0, random_weight(GgmlType.Q4_0, (4, 48)))
    own_table = random_weight(GgmlType.IQ4_NL, (4, 64))
    own_table.tensors["table"][3] = 7
    with pytest.raises(FormatError, match="one table"):
        write_blocks(GgmlType.IQ4_NL, own_table)
    with pytest.raises(FormatError, match="no weight is stored"):
        spec_of(GgmlType.I32)
    with pytest.raises(PlanError, match="blocks of 256"):
        GgmlBlocks().quantize(torch.zeros(2, 128), spec_of(GgmlType.Q4_K))
    with pytest.raises(PlanError, match="IQ1_S can.t be made of the weight alone"):
        GgmlBlocks().quantize(torch.zeros(2, 256), spec_of(GgmlType.IQ1_S))
    for value in (float("nan"), float("inf"), 1e38):
        for name in ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "F16"):
            if name == "F16" and value != 1e38:
                continue  # fp16 holds these
            weight = torch.randn(2, 256)
            weight[1, 77] = value
            with pytest.raises(PlanError, match="holds values"):
                GgmlBlocks().quantize(weight, GGML_SPECS[name])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our file, and what gguf made of it; its own file of its own quantizations."""
    require("gguf")
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("gguf")
    weights = {kind.name: random_weight(kind, (19, 512)) for kind in KINDS}
    entries = [
        Entry(name, (19, 512), GgmlType[name], lambda name=name: write_blocks(GgmlType[name], weights[name]))
        for name in weights
    ]
    entries.append(Entry("norm", (5,), GgmlType.F32, lambda: torch.arange(5.0)))
    entries.append(Entry("experts", (3, 2, 64), GgmlType.F16, lambda: torch.arange(384.0).half()))
    write_gguf(folder / "ours.gguf", METADATA, entries)
    save_file({"a": torch.randn(24, 512), "b": awkward(16)}, folder / "weights.safetensors")
    run("original_gguf.py", "run", folder)
    return folder


def awkward(rows: int) -> torch.Tensor:
    """Rows of zeros, of one value, of one sign, of ties, with large and with few numbers: ``[rows, 512]``."""
    weight = torch.randn(rows, 512) * 0.02
    weight[0], weight[1], weight[2] = 0, 1, -1
    weight[3], weight[4] = weight[3].abs(), -weight[4].abs()
    weight[5] = torch.arange(512) % 16 - 8
    weight[6, 256:], weight[7, 32:] = 0, 0
    weight[8, ::256] = 30
    weight[9] *= 1e-6
    return weight


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not GgmlType.Q1_0], ids=lambda kind: kind.name)
def test_dequantization_has_ggufs_bits(kind: GgmlType, original: Path) -> None:
    ours = open_gguf(original / "ours.gguf")
    tensor = read_blocks(kind, ours.raw(kind.name), (19, 512))
    theirs = load_file(original / "theirs.safetensors")[kind.name]
    assert torch.equal(tensor.dequantize(), theirs)
    assert bool(torch.isfinite(theirs).all()) and float(theirs.abs().max()) > 0


def test_gguf_reads_our_metadata(original: Path) -> None:
    theirs = json.loads((original / "metadata.json").read_text(encoding="utf-8"))
    ours = open_gguf(original / "ours.gguf")
    assert list(theirs) == list(ours.metadata)
    for key, value in METADATA.items():
        plain = value.value if isinstance(value, Typed) else value
        assert theirs[key][0] == ours.metadata[key] == plain
        assert theirs[key][1] == [kind.name for kind in ours.types[key]]
    dense = load_file(original / "theirs.safetensors")
    assert torch.equal(dense["norm"], ours.dense("norm"))
    assert torch.equal(dense["experts"], ours.dense("experts").float())


def test_we_read_ggufs_metadata_and_make_its_codes(original: Path) -> None:
    theirs = open_gguf(original / "theirs.gguf")
    values = [theirs.metadata[f"a.{name}"] for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32")]
    assert values == [255, -128, 65535, -2, 2**32 - 1, -3]
    assert (theirs.metadata["a.uint64"], theirs.metadata["a.int64"]) == (2**64 - 1, -(2**63))
    assert (theirs.metadata["a.float32"], theirs.metadata["a.float64"]) == (0.5, 0.1)
    assert theirs.metadata["a.bool"] is True and theirs.metadata["a.string"] == "Ġthe ▁"
    assert theirs.metadata["a.strings"] == ["", "é", "<s>"]
    assert theirs.metadata["a.ints"] == [1, -2, 3] and theirs.metadata["a.floats"] == [0.5, -0.25]
    for name, weight in load_file(original / "weights.safetensors").items():
        for kind in map(GgmlType.__getitem__, MADE):
            made = GgmlBlocks().quantize(weight, spec_of(kind))
            assert torch.equal(write_blocks(kind, made), theirs.raw(f"{name}.{kind.name}")), (name, kind)


def test_llama_cpp_makes_the_same_blocks(tmp_path: Path) -> None:
    require("xllamacpp")
    torch.manual_seed(1)
    weights = {"a": (torch.randn(48, 512) * 0.02).bfloat16().float(), "b": awkward(16), "c": torch.randn(16, 512) ** 3}
    save_file(weights, tmp_path / "weights.safetensors")
    run("original_ggml.py", tmp_path)
    for name, stored in load_file(tmp_path / "theirs.safetensors").items():
        weight, kind = weights[name.split(".")[0]], GgmlType[name.split(".")[1]]
        made = write_blocks(kind, GgmlBlocks().quantize(weight, spec_of(kind)))
        assert torch.equal(made, stored), name


HEADS = {"attn_q": 4, "attn_k": 2}
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.mark.parametrize("name", ["Q4_K_M", "Q8_0"])
def test_the_files_that_llama_cpp_made_come_out_the_same(name: str, testbed: Path, tmp_path: Path) -> None:
    """Types by the mixture, every block of every tensor, and the file as a whole."""
    theirs = open_gguf(testbed / "gguf" / f"small-{name}.gguf")
    dense = load_file(next((testbed / "small").glob("*.safetensors")))
    facts, chosen = ModelFacts("llama", 4, 4, 2, tied=True), mixture(name)
    assert theirs.metadata["general.file_type"] == chosen.file_type
    for tensor, info in theirs.tensors.items():
        assert chosen(tensor, info.shape, facts) is info.type
        if info.type.dense:
            continue
        read = read_blocks(info.type, theirs.raw(tensor), (info.rows, info.shape[-1]))
        assert torch.equal(write_blocks(info.type, read), theirs.raw(tensor))
        made = GgmlBlocks().quantize(_weight(dense, tensor), spec_of(info.type))
        assert torch.equal(write_blocks(info.type, made), theirs.raw(tensor)), tensor
    metadata = {key: Typed(value, theirs.types[key][-1]) for key, value in theirs.metadata.items()}
    entries = [Entry(n, i.shape, i.type, lambda n=n: theirs.raw(n)) for n, i in theirs.tensors.items()]
    write_gguf(tmp_path / "again.gguf", metadata, entries)
    assert (tmp_path / "again.gguf").read_bytes() == theirs.path.read_bytes()


def _weight(dense: dict[str, torch.Tensor], tensor: str) -> torch.Tensor:
    """The weight as llama.cpp has it: rows of queries and keys in the order of its rotary embedding."""
    if tensor == "token_embd.weight":
        return dense["model.embed_tokens.weight"]
    _, layer, kind, _ = tensor.split(".")
    weight = dense[f"model.layers.{layer}.{MODULES[kind]}.weight"]
    if heads := HEADS.get(kind):
        weight = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)
    return weight
