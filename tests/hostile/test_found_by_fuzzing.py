"""What fuzzing found, by name: each of these once ended in an error that was not lowbit's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import lowbit
from lowbit.errors import FormatError, LowbitError
from lowbit.wire import GptqWire, wire_named
from lowbit.wire.awq import AwqWire
from samples import MODULES, Sample, samples


@pytest.mark.parametrize("sample", samples(), ids=str)
def test_a_packed_tensor_with_a_side_of_length_zero(sample: Sample, tmp_path: Path) -> None:
    for name, tensor in sample.tensors.items():
        for axis in range(tensor.dim()):
            if not name.startswith(MODULES[0]):
                continue
            changed = {**sample.tensors, name: tensor.narrow(axis, 0, 0).contiguous()}
            save_file(changed, sample.save(tmp_path) / "model.safetensors", {"format": "pt", **sample.metadata})
            try:
                weight = lowbit.open_checkpoint(tmp_path).weights[MODULES[0]].dequantize()
            except LowbitError:
                continue
            assert tuple(weight.shape) == (64, 128), name  # a tensor that says nothing of the weight


@pytest.mark.parametrize("version", [[], [0], {"a": 1}, 3])
def test_a_version_that_is_no_text(version: Any) -> None:
    with pytest.raises(FormatError, match="unknown GPTQ checkpoint format"):
        GptqWire().parse({"bits": 4, "checkpoint_format": version or [0]})
    with pytest.raises(FormatError, match="unknown AWQ version"):
        AwqWire().parse({"bits": 4, "version": version or [0]})


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_group_size_past_every_integer(name: str) -> None:
    with pytest.raises(FormatError, match="group_size is out of range"):
        wire_named(name).parse({"bits": 4, "group_size": 2**70})
