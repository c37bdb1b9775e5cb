"""The layout of Marlin against AutoGPTQ's own packer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apart
import peers
from lowbit.algorithms import RoundToNearest
from lowbit.core import integer_spec
from lowbit.wire import GptqWire
from lowbit.wire.gptq import GptqSettings


@pytest.fixture(scope="module")
def packer() -> Any:
    """AutoGPTQ's layer, made without its constructor, which asks for a GPU."""
    apart.require("auto_gptq")
    folder = peers.package_dir("auto_gptq", "auto-gptq==0.7.1") / "nn_modules" / "qlinear"
    return peers._load_file(folder / "qlinear_marlin.py", {"autogptq_marlin_cuda": None}).QuantLinear


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("shape", [(256, 128), (512, 384)])
def test_marlin_equals_what_autogptq_packs(packer: Any, group_size: int, shape: tuple[int, int]) -> None:
    ours = RoundToNearest(symmetric=True).quantize(torch.randn(shape), integer_spec(4, group_size))
    layer = packer.__new__(packer)
    torch.nn.Module.__init__(layer)
    layer.infeatures, layer.outfeatures, layer.bias = shape[1], shape[0], None
    layer.group_size = shape[1] if group_size == -1 else group_size
    layer.B = torch.empty(shape[1] // 16, shape[0] * 2, dtype=torch.int32)
    layer.s = torch.empty(shape[1] // layer.group_size, shape[0], dtype=torch.float16)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float16)
    linear.weight.data = ours.dequantize(torch.float16)
    layer.pack(linear, ours.tensors["scales"])

    wire, settings = GptqWire(), GptqSettings(4, group_size, marlin=True)
    read = wire.read(settings, {"B": layer.B, "s": layer.s})
    assert torch.equal(read.dequantize(torch.float16), linear.weight)
    written = wire.write(settings, ours)
    assert torch.equal(written["B"], layer.B)
    assert torch.equal(written["s"], layer.s)
