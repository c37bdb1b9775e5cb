"""GgmlBlocks with an importance matrix, and IQ1, IQ2 and IQ3 without one, against llama.cpp's own quantizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_gguf_types
from apart import require, run
from lowbit.algorithms import GgmlBlocks
from lowbit.algorithms.statistics import Statistics
from lowbit.wire.gguf import GgmlType, spec_of, write_blocks

PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
ALONE = ("IQ1_M", "IQ2_S", "IQ3_XXS", "IQ3_S")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """Weights, importance, and what llama.cpp makes of them."""
    require("xllamacpp")
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("importance")
    real = load_file(next(small.glob("*.safetensors")))["model.layers.1.mlp.down_proj.weight"].float()
    weights = {
        "normal": (torch.randn(40, 512) * 0.02).bfloat16().float(),
        "awkward": test_gguf_types.awkward(16),
        "cubed": torch.randn(16, 512) ** 3,
        "real": real[:64].contiguous(),
    }
    # A long tail, a few columns that don't matter at all, and for one weight a whole block of these.
    importance = {name: torch.rand(weight.shape[1]) ** 4 * 9 for name, weight in weights.items()}
    importance["normal"][::37] = 0
    importance["cubed"][256:] = 0
    save_file(weights, folder / "weights.safetensors")
    save_file(importance, folder / "importance.safetensors")
    run("original_ggml.py", folder)
    return folder


@pytest.mark.parametrize("kind", PLAIN + GRIDS)
def test_llama_cpp_makes_the_same_blocks_of_importance(kind: str, original: Path) -> None:
    theirs, importance = load_file(original / "theirs.safetensors"), load_file(original / "importance.safetensors")
    for name, weight in load_file(original / "weights.safetensors").items():
        made = GgmlBlocks().calibrated(weight, spec_of(GgmlType[kind]), Statistics(squares=importance[name]))
        assert torch.equal(write_blocks(GgmlType[kind], made), theirs[f"{name}.{kind}.weighted"]), name


@pytest.mark.parametrize("kind", ALONE)
def test_llama_cpp_makes_the_same_blocks_of_the_weight_alone(kind: str, original: Path) -> None:
    theirs = load_file(original / "theirs.safetensors")
    for name, weight in load_file(original / "weights.safetensors").items():
        made = GgmlBlocks().quantize(weight, spec_of(GgmlType[kind]))
        assert torch.equal(write_blocks(GgmlType[kind], made), theirs[f"{name}.{kind}"]), name
