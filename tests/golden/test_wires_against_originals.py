"""Every wire against the library that the format belongs to, in both directions, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import apart
import lowbit
import make_checkpoints
import peers
from lowbit.algorithms import RoundToNearest, quantize
from lowbit.core import linear
from lowbit.nn import QuantLinear
from lowbit.wire import AwqWire, Bitsandbytes4Wire, Bitsandbytes8Wire, GptqWire
from lowbit.wire.awq import AwqSettings
from lowbit.wire.bitsandbytes import Settings4, Settings8
from lowbit.wire.gptq import GptqSettings

SMALL = Path(lowbit.__file__).parent / "assets" / "small"
PROMPT = "The city of London is the capital of"


def needs(package: str, hint: str) -> pytest.MarkDecorator:
    missing = not apart.has(package)
    return pytest.mark.skipif(missing, reason=f"the original library is not installed: {hint}")


autogptq = needs("auto_gptq", "auto-gptq==0.7.1")
autoawq = needs("awq", "autoawq==0.2.9")
gptqmodel = needs("gptqmodel", "gptqmodel==7.7.0")
bitsandbytes = needs("bitsandbytes", "bitsandbytes==0.50.2")


def weight(out_features: int = 64, in_features: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05


def gptq_case(bits: int, group_size: int, desc_act: bool, lowest_zero: int) -> tuple[torch.Tensor, ...]:
    dense = weight()
    groups = make_checkpoints.group_index(dense.shape[1], group_size, desc_act)
    scales, zeros = make_checkpoints.gptq_parameters(dense, groups, bits, sym=False, lowest_zero=lowest_zero)
    return make_checkpoints.on_the_grid(dense, scales, zeros, groups, bits), scales, zeros, groups


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: packed weights under a float dtype hold NaNs."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(raw(ours[name]), raw(tensor)), name


@autogptq
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "desc_act"), [(32, False), (128, False), (-1, False), (64, True)])
def test_gptq_reads_and_rewrites_what_autogptq_packed(bits: int, group_size: int, desc_act: bool) -> None:
    rounded, scales, zeros, groups = gptq_case(bits, group_size, desc_act, lowest_zero=1)
    packed = peers.autogptq_pack(rounded, scales, zeros, groups if desc_act else None, bits, group_size)
    settings = GptqSettings(bits, group_size, symmetric=False, borrows=False)
    read = GptqWire().read(settings, packed)
    assert torch.equal(read.dequantize(torch.float16), peers.autogptq_dequantize(packed, bits, group_size))
    assert_same_tensors(GptqWire().write(settings, read), packed)


@autogptq
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_autogptq_reads_what_lowbit_wrote(bits: int, group_size: int) -> None:
    settings = GptqSettings(bits, group_size, symmetric=True)
    ours = RoundToNearest(symmetric=True).quantize(weight(), GptqWire().spec(settings))
    written = GptqWire().write(settings, ours)
    assert torch.equal(peers.autogptq_dequantize(written, bits, group_size), ours.dequantize(torch.float16))


@gptqmodel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_with_zero_points_of_zero_agrees_with_gptqmodel(bits: int, version: int, desc_act: bool) -> None:
    name = "gptq" if version == 1 else "gptq_v2"
    rounded, scales, zeros, groups = gptq_case(bits, 32, desc_act, lowest_zero=0)
    zeros = torch.where(torch.rand(zeros.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 0, zeros)
    rounded = make_checkpoints.on_the_grid(rounded, scales, zeros, groups, bits)
    assert (zeros == 0).any()
    packed = peers.gptqmodel_pack(rounded, scales, zeros, groups, bits, 32, name)
    settings = GptqSettings(bits, 32, symmetric=False, version=version)
    read = GptqWire().read(settings, packed)
    assert torch.equal(read.dequantize(torch.float16), peers.gptqmodel_dequantize(packed, bits, 32, name))
    assert_same_tensors(GptqWire().write(settings, read), packed)


@autogptq
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_v1_zero_point_of_all_ones_is_read_as_autogptq_reads_it(bits: int) -> None:
    rounded, scales, zeros, _ = gptq_case(bits, 32, False, lowest_zero=1)
    packed = peers.autogptq_pack(rounded, scales, zeros, None, bits, 32)
    packed["qzeros"][0, 0] = -1
    read = GptqWire().read(GptqSettings(bits, 32, symmetric=False, borrows=False), packed)
    assert torch.equal(read.dequantize(torch.float16), peers.autogptq_dequantize(packed, bits, 32, "cuda_old"))


@autoawq
@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq_reads_and_rewrites_what_autoawq_packed(version: str, group_size: int) -> None:
    dense = weight()
    scales, zeros = make_checkpoints.awq_parameters(dense, group_size)
    groups = make_checkpoints.group_index(dense.shape[1], group_size)
    rounded = make_checkpoints.on_the_grid(dense, scales, zeros, groups, 4)
    packed = peers.autoawq_pack(rounded, scales, zeros, group_size, version)
    settings = AwqSettings(version, group_size, version=version)
    read = AwqWire().read(settings, packed)
    assert torch.equal(read.dequantize(torch.float16), peers.autoawq_dequantize(packed, version, group_size))
    assert_same_tensors(AwqWire().write(settings, read), packed)


@autoawq
@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_autoawq_reads_what_lowbit_wrote(version: str, group_size: int) -> None:
    settings = AwqSettings(version, group_size, version=version)
    ours = RoundToNearest().quantize(weight(), AwqWire().spec(settings))
    written = AwqWire().write(settings, ours)
    assert torch.equal(peers.autoawq_dequantize(written, version, group_size), ours.dequantize(torch.float16))


@bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32])
def test_bitsandbytes_4bit_to_the_bit(kind: str, nested: bool, dtype: torch.dtype, storage: torch.dtype) -> None:
    from bitsandbytes import functional

    dense = weight(96, 192).to(dtype)
    packed, state = functional.quantize_4bit(dense, quant_type=kind, compress_statistics=nested, quant_storage=storage)
    theirs = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    settings = Settings4(kind, nested, storage, dtype=dtype)
    read = Bitsandbytes4Wire().read(settings, theirs)
    assert torch.equal(read.dequantize(dtype), functional.dequantize_4bit(packed, state))
    assert_same_tensors(Bitsandbytes4Wire().write(settings, read), theirs)
    ours = quantize(dense, Bitsandbytes4Wire().spec(settings))
    assert_same_tensors(Bitsandbytes4Wire().write(settings, ours), theirs)


@bitsandbytes
@pytest.mark.parametrize("shape", [(7, 9), (33, 65), (1, 1), (64, 64)])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit_blocks_that_straddle_rows(shape: tuple[int, int], block_size: int, nested: bool) -> None:
    from bitsandbytes import functional

    dense = weight(*shape).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(dense, blocksize=block_size, quant_type="nf4", compress_statistics=nested)
    theirs = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    settings = Settings4("nf4", nested, block_size=block_size)
    ours = quantize(dense, Bitsandbytes4Wire().spec(settings))
    assert_same_tensors(Bitsandbytes4Wire().write(settings, ours), theirs)
    assert torch.equal(ours.dequantize(torch.bfloat16), dequantize_without_cpu_kernel(packed, state, shape))


def dequantize_without_cpu_kernel(packed: torch.Tensor, state: Any, shape: tuple[int, int]) -> torch.Tensor:
    """bitsandbytes' own torch code.

    Its CPU kernel (0.50.2) restarts the blocks in every row, which its quantizer and its other devices don't do.
    """
    from bitsandbytes.backends.default import ops

    if state.nested:
        absmax = (
            state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
        )
        absmax = absmax + state.offset
    else:
        absmax = state.absmax
    compute = getattr(ops._dequantize_4bit_compute, "__wrapped__", ops._dequantize_4bit_compute)
    return compute(packed.reshape(-1), absmax, state.code, state.blocksize, shape, state.dtype)


@bitsandbytes
def test_nested_statistics_agree_over_many_blocks() -> None:
    from bitsandbytes import functional

    for seed in range(8):
        dense = weight(512, 1024, seed)
        _, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        ours = quantize(dense, Bitsandbytes4Wire().spec(Settings4("nf4", True, dtype=torch.float32)))
        assert torch.equal(ours.tensors["scales"], state.absmax)


@bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_int8_to_the_bit(dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    dense = weight(48, 200).to(dtype)
    dense[3] = 0
    codes, absmax, _ = functional.int8_vectorwise_quant(dense.to(torch.float16))
    theirs = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    settings = Settings8()
    ours = quantize(dense, Bitsandbytes8Wire().spec(settings))
    assert_same_tensors(Bitsandbytes8Wire().write(settings, ours), theirs)
    without_format = {name: tensor for name, tensor in theirs.items() if name != "weight_format"}
    read = Bitsandbytes8Wire().read(settings, without_format)
    assert torch.equal(read.dequantize(), functional.int8_vectorwise_dequant(codes, absmax))


@bitsandbytes
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5])
def test_llm_int8_forward_equals_bitsandbytes(threshold: float, dtype: torch.dtype, rows: int) -> None:
    import bitsandbytes as bnb

    dense = weight(48, 200)
    inputs = torch.randn(rows, 200, generator=torch.Generator().manual_seed(2)).to(dtype)
    inputs[:, 7] = 9.5
    inputs[0, 11] = -61
    tensor = quantize(dense, Bitsandbytes8Wire().spec(Settings8(threshold)))
    state = bnb.MatmulLtState()
    state.CB, state.SCB = tensor.tensors["codes"], tensor.tensors["scales"].squeeze(1)
    state.threshold, state.has_fp16_weights, state.is_training = threshold, False, False
    theirs = bnb.matmul(inputs.clone(), state.CB, state=state, threshold=threshold)
    ours = linear(inputs, tensor.spec, tensor.tensors, tensor.shape)
    assert torch.equal(ours, theirs)


CHECKPOINTS = {
    "gptq-4": lambda src, dst: make_checkpoints.write_gptq(src, dst, 4, 128, sym=True),
    "gptq-3-asym": lambda src, dst: make_checkpoints.write_gptq(src, dst, 3, 64, sym=False),
    "gptq-2-desc_act": lambda src, dst: make_checkpoints.write_gptq(src, dst, 2, 64, desc_act=True),
    "gptq-8-row": lambda src, dst: make_checkpoints.write_gptq(src, dst, 8, -1),
    "gptq-no-g_idx": lambda src, dst: make_checkpoints.write_gptq(src, dst, 4, 128, with_g_idx=False),
    "gptq-sidecar": lambda src, dst: make_checkpoints.write_gptq(
        src, dst, 4, 128, sidecar=True, weights_name="gptq_model-4bit-128g.safetensors"
    ),
    "gptq-v2-asym": lambda src, dst: make_checkpoints.write_gptq(src, dst, 4, 32, False, True, "gptq_v2"),
    "awq-gemm": lambda src, dst: make_checkpoints.write_awq(src, dst, "gemm", 128),
    "awq-gemm-skip": lambda src, dst: make_checkpoints.write_awq(src, dst, "gemm", 64, ["self_attn.k_proj"]),
    "awq-gemv": lambda src, dst: make_checkpoints.write_awq(src, dst, "gemv", 64),
    "awq-gemv_fast": lambda src, dst: make_checkpoints.write_awq(src, dst, "gemv_fast", 32),
    "bnb-nf4": lambda src, dst: make_checkpoints.write_bitsandbytes(
        src, dst, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    ),
    "bnb-nf4-nested-bf16": lambda src, dst: make_checkpoints.write_bitsandbytes(
        src,
        dst,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage="bfloat16",
    ),
    "bnb-fp4": lambda src, dst: make_checkpoints.write_bitsandbytes(src, dst, load_in_4bit=True),
    "bnb-int8": lambda src, dst: make_checkpoints.write_bitsandbytes(src, dst, load_in_8bit=True),
}
# What stock Transformers, or the library under it, can't load on a CPU.
UNREADABLE_BY_STOCK = {"gptq-no-g_idx", "gptq-sidecar", "awq-gemv", "awq-gemv_fast"}


@autogptq
@autoawq
@gptqmodel
@bitsandbytes
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_the_originals_load_with_equal_weights_and_logits(kind: str, tmp_path: Path) -> None:
    expected = CHECKPOINTS[kind](SMALL, tmp_path)
    checkpoint = lowbit.open_checkpoint(tmp_path)
    assert set(checkpoint.weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.weights[name].dequantize(tensor.dtype), tensor), name

    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for name, tensor in expected.items():
        assert torch.equal(model.get_submodule(name).dequantize(tensor.dtype), tensor), name
    if kind not in UNREADABLE_BY_STOCK:
        assert_same_logits(model, tmp_path)


def assert_same_logits(model: transformers.PreTrainedModel, path: Path) -> None:
    """bitsandbytes: to the bit. gptqmodel multiplies in another order: 6 times the largest difference seen."""
    ids = transformers.AutoTokenizer.from_pretrained(SMALL)(PROMPT, return_tensors="pt").input_ids
    stock = peers.transformers_logits_with_peers(path, ids, str(model.dtype).removeprefix("torch."))
    with torch.no_grad():
        difference = (model(ids).logits.float() - stock).abs().max()
    bound = 0.0 if model.config.quantization_config.quant_method == "bitsandbytes" else 0.1
    assert difference <= bound


WRITTEN = {
    "gptq-4-sym": lambda: lowbit.GPTQConfig(bits=4),
    "gptq-4-asym": lambda: lowbit.GPTQConfig(bits=4, group_size=32, sym=False),
    "gptq-2-v2": lambda: lowbit.GPTQConfig(bits=2, group_size=32, sym=False, format="gptq_v2"),
    "gptq-3": lambda: lowbit.GPTQConfig(bits=3, group_size=-1),
    "gptq-8": lambda: lowbit.GPTQConfig(bits=8, group_size=64),
    "awq": lambda: lowbit.AwqConfig(group_size=64),
    "awq-skip": lambda: lowbit.AwqConfig(modules_to_not_convert=["self_attn.k_proj"]),
    "nf4": lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4-nested": lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "nf4-skip": lambda: lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["k_proj"]
    ),
    "int8": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
}


@gptqmodel
@bitsandbytes
@pytest.mark.parametrize("kind", WRITTEN)
def test_stock_transformers_reads_what_lowbit_saved(kind: str, tmp_path: Path) -> None:
    model = lowbit.AutoModelForCausalLM.from_pretrained(SMALL, quantization_config=WRITTEN[kind](), dtype=torch.float16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "bitsandbytes":
        stock = peers.bitsandbytes_weights(tmp_path)
    else:
        stock = peers.transformers_weights_with_peers(tmp_path)
    ours = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(stock) == set(ours)
    for name, tensor in stock.items():
        assert torch.equal(ours[name].dequantize(tensor.dtype), tensor), name
    assert_same_logits(model, tmp_path)
