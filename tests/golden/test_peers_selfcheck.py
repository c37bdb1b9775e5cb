"""The oracles themselves: each reads back exactly what it packed, and they agree with one another.

No tolerances. A test skips where its library isn't installed; :mod:`peers` says how to install each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import apart
import make_checkpoints
import peers

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, -1)
PACKED = ("qweight", "qzeros", "scales", "g_idx")


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip where one of these top-level packages is not installed."""
    missing = [package for package in packages if not apart.has(package)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Grid:
    """A random weight on a quantization grid: codes `q` [out, in], `zeros` and `scales` [out, G], `g_idx` [in]."""

    def __init__(self, bits: int, group_size: int, lowest_zero: int, desc_act: bool = False) -> None:
        torch.manual_seed(bits * 1000 + group_size)
        out_features, in_features = 64, 128
        self.g_idx = make_checkpoints.group_index(in_features, group_size, desc_act)
        groups = int(self.g_idx.max()) + 1
        self.q = torch.randint(0, 2**bits, (out_features, in_features))
        self.zeros = torch.randint(lowest_zero, 2**bits, (out_features, groups))
        self.scales = (torch.rand(out_features, groups) * 0.1 + 0.01).half()
        columns = self.g_idx.long()
        self.weight = (self.q - self.zeros[:, columns]).float() * self.scales[:, columns].float()
        self.expected = self.weight.half()


def zero_fields(qzeros: torch.Tensor, bits: int) -> list[int]:
    """The fields of one row of packed zero points, lowest first."""
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(qzeros[0].tolist()))
    return [(whole >> (bits * i)) & (2**bits - 1) for i in range(qzeros.shape[1] * 32 // bits)]


def zero_words(fields: list[int], bits: int) -> torch.Tensor:
    """The inverse of :func:`zero_fields`: int32 [1, len(fields) * bits / 32]."""
    whole = sum(field << (bits * i) for i, field in enumerate(fields))
    words = [(whole >> shift) & 0xFFFFFFFF for shift in range(0, len(fields) * bits, 32)]
    return torch.tensor([words], dtype=torch.int64).to(torch.int32)


# auto-gptq


@needs("auto_gptq")
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_autogptq_reads_what_it_packed(bits: int, group_size: int, desc_act: bool) -> None:
    grid = Grid(bits, group_size, lowest_zero=1, desc_act=desc_act)
    g_idx = grid.g_idx if desc_act else None
    packed = peers.autogptq_pack(grid.weight, grid.scales, grid.zeros, g_idx, bits, group_size)
    assert torch.equal(peers.autogptq_dequantize(packed, bits, group_size), grid.expected)
    assert torch.equal(packed["g_idx"], grid.g_idx)


@needs("auto_gptq")
@pytest.mark.parametrize("bits", BITS)
def test_both_autogptq_layers_write_the_same_bits(bits: int) -> None:
    grid = Grid(bits, 32, lowest_zero=1)
    one, other = (
        peers.autogptq_pack(grid.weight, grid.scales, grid.zeros, grid.g_idx, bits, 32, kind)
        for kind in ("cuda_old", "cuda")
    )
    assert all(torch.equal(one[name], other[name]) for name in PACKED)


@needs("auto_gptq")
def test_packing_leaves_its_arguments_alone() -> None:
    grid = Grid(4, -1, lowest_zero=1)
    zeros = grid.zeros.float()
    peers.autogptq_pack(grid.weight, grid.scales, zeros, None, 4, -1)
    assert torch.equal(zeros, grid.zeros.float())


# gptqmodel


@needs("auto_gptq", "gptqmodel")
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_agrees_with_autogptq(bits: int, desc_act: bool) -> None:
    grid = Grid(bits, 32, lowest_zero=1, desc_act=desc_act)
    arguments = (grid.weight, grid.scales, grid.zeros, grid.g_idx, bits, 32)
    packed = peers.gptqmodel_pack(*arguments, "gptq")
    theirs = peers.autogptq_pack(*arguments, kind="cuda")
    assert all(torch.equal(packed[name], theirs[name]) for name in PACKED)
    assert torch.equal(peers.gptqmodel_dequantize(theirs, bits, 32, "gptq"), grid.expected)


@needs("gptqmodel")
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_reads_what_it_packed(bits: int, checkpoint_format: str) -> None:
    grid = Grid(bits, 64, lowest_zero=0, desc_act=True)
    packed = peers.gptqmodel_pack(grid.weight, grid.scales, grid.zeros, grid.g_idx, bits, 64, checkpoint_format)
    assert torch.equal(peers.gptqmodel_dequantize(packed, bits, 64, checkpoint_format), grid.expected)


# v1's zero point of 0


@needs("auto_gptq")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["cuda_old", "cuda"])
def test_autogptq_spills_a_zero_point_of_zero(kind: str, bits: int) -> None:
    zeros = torch.full((32, 1), 2)
    zeros[1] = 0
    packed = peers.autogptq_pack(1.0 - zeros.expand(32, 32), torch.ones(32, 1), zeros, None, bits, -1, kind)
    first_word = int(packed["qzeros"][0, 0]) & 0xFFFFFFFF
    assert first_word == (0xFFFFFFFF << bits) & 0xFFFFFFFF | 1  # field 0 is right, all above it is ones
    others = zero_fields(packed["qzeros"], bits)[-(-32 // bits) :]
    assert set(others) <= {1}


@needs("gptqmodel")
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_borrows_for_a_zero_point_of_zero(bits: int) -> None:
    zeros = torch.full((32, 1), 2)
    zeros[1] = 0
    packed = peers.gptqmodel_pack(1.0 - zeros.expand(32, 32), torch.ones(32, 1), zeros, None, bits, -1, "gptq")
    expected = [1] * 32
    expected[1] = 2**bits - 1
    expected[2] = 1 if bits == 3 else 0
    assert zero_fields(packed["qzeros"], bits) == expected


def zero_points_read(reader: str, bits: int) -> list[int]:
    """What `reader` makes of v1 fields that are all 1, except the second, which has all bits set."""
    fields = [1] * 32
    fields[1] = 2**bits - 1
    tensors = {
        "qweight": torch.zeros(bits, 32, dtype=torch.int32),
        "qzeros": zero_words(fields, bits),
        "scales": torch.ones(1, 32, dtype=torch.float16),
        "g_idx": torch.zeros(32, dtype=torch.int32),
    }
    if reader == "gptqmodel":
        weight = peers.gptqmodel_dequantize(tensors, bits, -1, "gptq")
    else:
        weight = peers.autogptq_dequantize(tensors, bits, -1, kind=reader)
    return (-weight[:, 0]).int().tolist()


@needs("auto_gptq")
@pytest.mark.parametrize(("bits", "cuda_old", "cuda"), [(2, 0, 4), (3, 8, 8), (4, 0, 16), (8, 0, 256)])
def test_how_autogptq_reads_a_stored_zero_of_all_ones(bits: int, cuda_old: int, cuda: int) -> None:
    assert zero_points_read("cuda_old", bits) == [2, cuda_old] + [2] * 30
    assert zero_points_read("cuda", bits) == [2, cuda] + [2] * 30


@needs("gptqmodel")
@pytest.mark.parametrize("bits", BITS)
def test_how_gptqmodel_reads_a_stored_zero_of_all_ones(bits: int) -> None:
    carried = 2 if bits == 3 else 3
    assert zero_points_read("gptqmodel", bits) == [2, 0, carried] + [2] * 29


# AWQ


@needs("awq")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_autoawq_reads_what_it_packed(version: str, group_size: int) -> None:
    grid = Grid(4, group_size, lowest_zero=0)
    packed = peers.autoawq_pack(grid.weight, grid.scales, grid.zeros, group_size, version)
    expected = grid.expected
    if version == "gemv_fast":
        columns = grid.g_idx.long()
        offsets = (-grid.zeros * grid.scales.float()).half().float()
        expected = (grid.q * grid.scales[:, columns].float() + offsets[:, columns]).half()
    assert torch.equal(peers.autoawq_dequantize(packed, version, group_size), expected)


@needs("awq", "gptqmodel")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gptqmodel_agrees_with_autoawq(group_size: int) -> None:
    grid = Grid(4, group_size, lowest_zero=0)
    packed = peers.gptqmodel_awq_pack(grid.weight, grid.scales, grid.zeros, group_size)
    theirs = peers.autoawq_pack(grid.weight, grid.scales, grid.zeros, group_size, "gemm")
    assert all(torch.equal(packed[name], theirs[name]) for name in theirs)
    assert torch.equal(peers.gptqmodel_awq_dequantize(theirs, group_size), grid.expected)


# Whole checkpoints


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, tied embeddings, bf16."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@needs("auto_gptq", "gptqmodel", "optimum")
@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "desc_act", "checkpoint_format"),
    [
        (4, 64, True, False, "gptq"),
        (3, 32, False, True, "gptq"),
        (8, -1, True, False, "gptq"),
        (2, 32, False, True, "gptq_v2"),
    ],
)
def test_stock_transformers_reads_gptq_checkpoints(
    dense: Path, tmp_path: Path, bits: int, group_size: int, sym: bool, desc_act: bool, checkpoint_format: str
) -> None:
    expected = make_checkpoints.write_gptq(dense, tmp_path, bits, group_size, sym, desc_act, checkpoint_format)
    found = peers.transformers_weights_with_peers(tmp_path)
    assert found.keys() == expected.keys()
    assert len(found) == 14
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert peers.transformers_logits_with_peers(tmp_path, torch.arange(12)[None]).isfinite().all()


@needs("awq", "gptqmodel")
@pytest.mark.parametrize("skip", [None, ["down_proj"]])
def test_stock_transformers_reads_awq_checkpoints(dense: Path, tmp_path: Path, skip: list[str] | None) -> None:
    expected = make_checkpoints.write_awq(dense, tmp_path, "gemm", 64, skip)
    found = peers.transformers_weights_with_peers(tmp_path)
    assert found.keys() == expected.keys()
    assert len(found) == (14 if skip is None else 12)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert peers.transformers_logits_with_peers(tmp_path, torch.arange(12)[None]).isfinite().all()


@needs("auto_gptq")
def test_the_sidecar_of_autogptq(dense: Path, tmp_path: Path) -> None:
    make_checkpoints.write_gptq(dense, tmp_path, 4, 64, with_g_idx=False, sidecar=True)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert json.loads((tmp_path / "quantize_config.json").read_text())["group_size"] == 64
    assert not any(name.endswith("g_idx") for name in load_file(tmp_path / "model.safetensors"))


@needs("bitsandbytes", "accelerate")
def test_bitsandbytes_int8_weights_are_those_of_the_file(dense: Path, tmp_path: Path) -> None:
    expected = make_checkpoints.write_bitsandbytes(dense, tmp_path, load_in_8bit=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert len(expected) == 14
    for name, weight in expected.items():
        rows = stored[f"{name}.SCB"].view(-1, 1)
        assert torch.equal(weight, stored[f"{name}.weight"] * rows * 7.874015718698502e-3)


@needs("bitsandbytes", "accelerate")
def test_bitsandbytes_nf4_weights_are_those_of_the_file(dense: Path, tmp_path: Path) -> None:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    expected = make_checkpoints.write_bitsandbytes(dense, tmp_path, **settings)
    stored = load_file(tmp_path / "model.safetensors")
    assert len(expected) == 14
    for name, weight in expected.items():
        pairs = stored[f"{name}.weight"].flatten().long()
        codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()
        values = stored[f"{name}.weight.quant_map"][codes].reshape(-1, 64)
        values = values * stored[f"{name}.weight.absmax"][:, None]
        assert torch.equal(weight, values.reshape(weight.shape).to(weight.dtype))


def test_a_missing_peer_says_what_to_install() -> None:
    with pytest.raises(peers.PeerMissing, match="pip install --no-deps some-library"):
        peers.package_dir("no_such_package_anywhere", "some-library")
