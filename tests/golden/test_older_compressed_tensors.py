"""What compressed-tensors 0.9.4 wrote and 0.20 can't read: padded words, group indices, weights without their zeros."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from lowbit.wire.compressed_tensors import CompressedTensorsWire

CASES: dict[str, Any] = json.loads(Path(__file__).with_name("older_compressed_tensors.json").read_text())
WIRE = CompressedTensorsWire()


def case(name: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    settings = WIRE.of(WIRE.parse(CASES[name]["config"]), "model.layers.0.mlp.down_proj")
    tensors = load(base64.b64decode(CASES[name]["tensors"]))
    return settings, tensors, tensors.pop("expected")


@pytest.mark.parametrize("name", CASES)
def test_older_files_dequantize_to_the_librarys_bits(name: str) -> None:
    settings, tensors, expected = case(name)
    dense = WIRE.read(settings, tensors).dequantize(expected.dtype)
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("name", CASES)
def test_they_are_saved_so_that_they_are_read_again(name: str) -> None:
    settings, tensors, _ = case(name)
    tensor = WIRE.read(settings, tensors)
    written = WIRE.write(settings, tensor)
    assert WIRE.read(settings, written).equal(tensor)
    if "padded" in name:  # they are packed densely now
        assert written["weight_packed"].shape[1] < tensors["weight_packed"].shape[1]
        return
    assert set(written) == set(tensors)
    for key, value in tensors.items():
        assert written[key].dtype == value.dtype and torch.equal(written[key].float(), value.float()), key
