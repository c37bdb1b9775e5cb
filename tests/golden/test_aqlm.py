"""AQLM against the library itself, in both directions, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import apart
import lowbit
from lowbit.algorithms.aqlm import AdditiveQuantization
from lowbit.core import Scale, VectorCode
from lowbit.nn import QuantLinear
from lowbit.wire import open_checkpoint
from lowbit.wire.aqlm import AqlmSettings, AqlmWire

apart.require("aqlm")

WIRE = AqlmWire()
VARIANTS = {
    "1x16": AqlmSettings(1, 16, 8, 1),
    "2x8": AqlmSettings(2, 8, 8, 1),
    "8x8": AqlmSettings(8, 8, 32, 1),
    "4x8": AqlmSettings(4, 8, 16, 1),
    "1x12": AqlmSettings(1, 12, 4, 1),
    "3x5": AqlmSettings(3, 5, 4, 2),
    "5x10": AqlmSettings(5, 10, 8, 4),
    "1x18": AqlmSettings(1, 18, 2, 2),
    "2x1": AqlmSettings(2, 1, 8, 1),
}
MODELS = ("1x10", "2x8", "2x8-tiles")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers and models as the original leaves them."""
    folder = tmp_path_factory.mktemp("aqlm")
    apart.run("original_aqlm.py", "write", folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_layers_have_the_bits_of_the_original(written: Path, name: str, dtype: str) -> None:
    settings, stored = VARIANTS[name], load_file(written / "layers.safetensors")
    tensors = {part: stored[f"{name}.{dtype}.{part}"] for part in WIRE.suffixes}
    read = WIRE.read(settings, tensors)
    assert read.spec.dtype == DTYPES[dtype]
    assert read.spec.code == VectorCode(settings.codebooks, settings.bits, settings.out_group, settings.in_group)
    assert torch.equal(read.dequantize(DTYPES[dtype]), stored[f"{name}.{dtype}.dense"])
    again = WIRE.write(settings, read)
    assert all(torch.equal(again[part], tensors[part]) and again[part].shape == tensors[part].shape for part in tensors)
    if settings.bits == 8:
        transposed = stored[f"{name}.{dtype}.transposed"]
        assert transposed.shape == (tensors["codes"].shape[1], 32, settings.codebooks)
        assert WIRE.read(settings, tensors | {"codes": transposed}).equal(read)


@pytest.fixture(scope="module")
def read_back(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lowbit saved, read by stock Transformers with AQLM."""
    folder = tmp_path_factory.mktemp("lowbit")
    for name in MODELS:
        lowbit.AutoModelForCausalLM.from_pretrained(written / name).save_pretrained(folder / name)
    stored = load_file(written / "layers.safetensors")
    layers = {}
    for name, settings in VARIANTS.items():
        for dtype in DTYPES:
            read = WIRE.read(settings, {part: stored[f"{name}.{dtype}.{part}"] for part in WIRE.suffixes})
            layers |= {f"{name}.{dtype}.{part}": value for part, value in WIRE.write(settings, read).items()}
    save_file(layers, folder / "layers.safetensors")
    apart.run("original_aqlm.py", "read", folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_models_load_stay_packed_and_have_the_bits(written: Path, name: str) -> None:
    dense = load_file(written / name / "dense.st")
    model = lowbit.AutoModelForCausalLM.from_pretrained(written / name)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert set(layers) == set(dense) and len(dense) == 14
    for key, layer in layers.items():
        assert torch.equal(layer.quant_tensor().dequantize(torch.float16), dense[key]), key
    weights = open_checkpoint(written / name).weights
    assert all(torch.equal(weights[key].dequantize(torch.float16), dense[key]) for key in dense)


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_reads_what_lowbit_saved(written: Path, read_back: Path, name: str) -> None:
    dense, read = load_file(written / name / "dense.st"), load_file(read_back / name / "read.st")
    assert set(read) == set(dense)
    assert all(torch.equal(read[key], weight) for key, weight in dense.items())


def test_the_original_reads_layers_that_lowbit_wrote(written: Path, read_back: Path) -> None:
    stored, read = load_file(written / "layers.safetensors"), load_file(read_back / "layers_read.safetensors")
    assert len(read) == len(VARIANTS) * len(DTYPES)
    assert all(torch.equal(weight, stored[f"{key}.dense"]) for key, weight in read.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers and a model whose codebooks lowbit has learned, read by the original and by stock Transformers with it."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    method, tensors = AdditiveQuantization(beam=2, epochs=1, iterations=2), {}
    for name, settings in VARIANTS.items():
        for dtype in DTYPES:
            spec = replace(WIRE.spec(settings), scale=Scale(DTYPES[dtype]), dtype=DTYPES[dtype])
            layer = method.quantize(torch.randn(32, 128), spec)
            tensors |= {f"{name}.{dtype}.{part}": value for part, value in WIRE.write(settings, layer).items()}
    save_file(tensors, folder / "layers.safetensors")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(intermediate_size=128, **sizes)).half().save_pretrained(folder / "dense")
    config = lowbit.AqlmConfig(num_codebooks=2, nbits_per_codebook=8, epochs=1)
    with pytest.warns(UserWarning, match="AQLM without calibration data"):
        model = lowbit.AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / "2x8")
    apart.run("original_aqlm.py", "read", folder)
    return folder


def test_the_original_reads_layers_whose_codebooks_lowbit_has_learned(made: Path) -> None:
    stored, read = load_file(made / "layers.safetensors"), load_file(made / "layers_read.safetensors")
    assert len(read) == len(VARIANTS) * len(DTYPES)
    for name, settings in VARIANTS.items():
        for dtype in DTYPES:
            layer = WIRE.read(settings, {part: stored[f"{name}.{dtype}.{part}"] for part in WIRE.suffixes})
            assert torch.equal(read[f"{name}.{dtype}"], layer.dequantize(DTYPES[dtype]))


def test_stock_transformers_reads_a_model_whose_codebooks_lowbit_has_learned(made: Path) -> None:
    read, weights = load_file(made / "2x8" / "read.st"), open_checkpoint(made / "2x8").weights
    assert set(read) == set(weights) and len(read) == 14
    assert all(torch.equal(read[name], weight.dequantize(torch.float16)) for name, weight in weights.items())
