"""Checkpoint files that are written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.wire.shards import ShardWriter

METADATA = {"quantization": json.dumps({"ümlaut": 'quo"te\n'}), "author": "somebody", "last": "\x01\x7f"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.int32, torch.uint8]
    made = {
        f"layer.{number}": (100 * torch.rand(100 + number, 10, generator=generator)).to(dtypes[number % len(dtypes)])
        for number in range(30)
    }
    return {**made, "tied": made["layer.3"], "nothing": torch.zeros(0, 4), "number": torch.tensor(1.5)}


def write(folder: Path, shard_bytes: int, held_bytes: int) -> dict[str, bytes]:
    folder.mkdir()
    writer = ShardWriter(folder, METADATA, shard_bytes, held_bytes)
    for name, tensor in tensors().items():
        writer.add(name, tensor)
    writer.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("held_bytes", [0, 3_000])
def test_what_waits_in_files_is_written_all_the_same(shard_bytes: int, held_bytes: int, tmp_path: Path) -> None:
    expected = write(tmp_path / "held", shard_bytes, 10**9)
    assert write(tmp_path / "spilled", shard_bytes, held_bytes) == expected
    read = {
        name: value
        for file in expected
        if "index" not in file
        for name, value in load_file(tmp_path / "spilled" / file).items()
    }
    assert read.keys() == tensors().keys()
    assert all(torch.equal(read[name], value) for name, value in tensors().items())


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    """The serializer itself has the metadata of a file in any order."""
    first = write(tmp_path / "0", 10**9, 10**9)
    assert all(write(tmp_path / f"{number}", 10**9, 10**9) == first for number in range(1, 10))
    ours = first["model.safetensors"]
    size = int.from_bytes(ours[:8], "little")
    assert list(json.loads(ours[8 : 8 + size])["__metadata__"].items()) == sorted({**METADATA, "format": "pt"}.items())


def test_little_waits_in_memory(tmp_path: Path) -> None:
    """Three tensors are more than may be held: each is written to a file of those that wait once."""
    writer = ShardWriter(tmp_path, {}, held_bytes=2_500)
    for number in range(10):
        writer.add(f"{number}", torch.zeros(1000, dtype=torch.uint8))
        assert len(list(tmp_path.iterdir())) == (number + 1) // 3
    assert [list(load_file(path)) for path in sorted(tmp_path.iterdir())] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
        ["6", "7", "8"],
    ]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
