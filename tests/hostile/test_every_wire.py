"""Containers, shards and configurations, hostile in every way that is known by name; for every wire there is."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lowbit
from lowbit.errors import FormatError, LowbitError
from lowbit.wire import wires
from samples import ELSEWHERE, MODEL, MODULES, Sample, samples

ONE_EACH = {sample.wire.name: sample for sample in samples()}
every_wire = pytest.mark.parametrize("sample", ONE_EACH.values(), ids=ONE_EACH)
every_sample = pytest.mark.parametrize("sample", samples(), ids=str)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = lowbit.open_checkpoint(folder)
    return {name: tensor.dequantize() for name, tensor in checkpoint.weights.items()}


def attempt(folder: Path) -> dict[str, torch.Tensor] | str:
    """The weights, or what lowbit says of them; any other error is a failure."""
    try:
        return read_all(folder)
    except LowbitError as error:
        return str(error)


def test_there_is_a_sample_of_every_wire() -> None:
    assert set(ONE_EACH) == {wire.name for wire in wires()} - ELSEWHERE


@every_sample
def test_samples_are_read(sample: Sample, tmp_path: Path) -> None:
    assert set(read_all(sample.save(tmp_path))) == set(MODULES)


# ---------------------------------------------------------------------------------------------------- the container


def raw_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, text: bytes, body: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header as an object; ``$`` is the first packed tensor."""

    def damage(path: Path) -> None:
        header, body = raw_header(path)
        name = next(name for name in header if name.startswith(MODULES[0]))
        entry = header[name]
        change(entry)
        with_header(path, json.dumps(header).encode(), body)

    return damage


def twice(offsets: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, body = raw_header(path)
        name = next(name for name in header if name.startswith(MODULES[0]))
        entry = dict(header[name])
        if offsets == "other":
            entry["data_offsets"] = [len(body), len(body) + entry["data_offsets"][1] - entry["data_offsets"][0]]
            body += bytes(entry["data_offsets"][1] - len(body))
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        with_header(path, text.encode(), body)

    return damage


def set_offsets(begin: Any, end: Any) -> Callable[[Path], None]:
    return edit_header(lambda entry: entry.update(data_offsets=[begin, end]))


def shift(begin: int, end: int) -> Callable[[Path], None]:
    return edit_header(
        lambda entry: entry.update(data_offsets=[entry["data_offsets"][0] + begin, entry["data_offsets"][1] + end])
    )


def metadata(value: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, body = raw_header(path)
        header["__metadata__"] = value
        with_header(path, json.dumps(header).encode(), body)

    return damage


CONTAINERS: dict[str, Callable[[Path], Any]] = {
    "empty file": lambda path: path.write_bytes(b""),
    "under 8 bytes": lambda path: path.write_bytes(b"1234567"),
    "git-lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "header past the file": lambda path: with_header(path, b"{}", length=10**6),
    "header over 100 MB": lambda path: with_header(path, b"{}", length=2 * 10**8),
    "header of 2**64-1 bytes": lambda path: with_header(path, b"{}", length=2**64 - 1),
    "header of 0 bytes": lambda path: with_header(path, b""),
    "header not UTF-8": lambda path: with_header(path, b'{"\xff\xfe": 1}'),
    "header not JSON": lambda path: with_header(path, b"{nope}"),
    "header not an object": lambda path: with_header(path, b"[1, 2]"),
    "header nested deep": lambda path: with_header(path, b'{"a":' * 10**5),
    "header of huge numbers": lambda path: with_header(path, b'{"a":' + b"9" * 10**5 + b"}"),
    "a name twice, with the same bytes": twice("same"),
    "a name twice, with other bytes": twice("other"),
    "overlapping offsets": shift(-4, -4),
    "a hole": shift(4, 4),
    "end before begin": shift(10**9, 0),
    "negative offsets": set_offsets(-8, -4),
    "float offsets": set_offsets(0.0, 4.0),
    "offsets of text": set_offsets("0", "4"),
    "offsets past 64 bits": set_offsets(0, 2**70),
    "trailing bytes": lambda path: path.write_bytes(path.read_bytes() + b"xyz"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "a shape whose product overflows": edit_header(lambda entry: entry.update(shape=[2**32, 2**32, 2**32])),
    "a negative shape": edit_header(lambda entry: entry.update(shape=[-1, -1])),
    "size against shape": edit_header(lambda entry: entry.update(shape=[3, 5, 7])),
    "unknown dtype": edit_header(lambda entry: entry.update(dtype="Q7")),
    "dtype of another kind": edit_header(lambda entry: entry.update(dtype=["F32"])),
    "an entry that is text": lambda path: with_header(path, b'{"a": "b"}'),
    "metadata of numbers": metadata({"format": 3}),
    "metadata that is a list": metadata(["pt"]),
    "nested metadata": metadata({"format": {"a": "b"}}),
    "missing": lambda path: path.unlink(),
    "a folder in its place": lambda path: (path.unlink(), path.mkdir()),
}


@every_wire
@pytest.mark.parametrize("damage", CONTAINERS)
def test_containers(damage: str, sample: Sample, tmp_path: Path) -> None:
    CONTAINERS[damage](sample.save(tmp_path) / "model.safetensors")
    with pytest.raises(FormatError) as error:
        read_all(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 3000


@every_wire
@pytest.mark.parametrize("shape", [[], [0], [0, 5], [0, 2**40]], ids=str)
def test_other_tensors_may_be_empty_or_numbers(shape: list[int], sample: Sample, tmp_path: Path) -> None:
    sample.save(tmp_path)
    header, body = raw_header(tmp_path / "model.safetensors")
    size = 0 if 0 in shape else 1
    header["extra"] = {"dtype": "U8", "shape": shape, "data_offsets": [len(body), len(body) + size]}
    with_header(tmp_path / "model.safetensors", json.dumps(header).encode(), body + bytes(size))
    assert set(read_all(tmp_path)) == set(MODULES)


@every_wire
def test_packed_tensors_of_no_element_or_no_dimension_are_refused(sample: Sample, tmp_path: Path) -> None:
    names = [name for name in sample.tensors if name.startswith(MODULES[0])]
    expected = read_all(sample.save(tmp_path))[MODULES[0]]
    for name in names:
        for value in (sample.tensors[name].new_empty(0), sample.tensors[name].new_zeros(())):
            if value.numel() == sample.tensors[name].numel():
                continue
            save_file({**sample.tensors, name: value}, sample.save(tmp_path) / "model.safetensors", sample.metadata)
            found = attempt(tmp_path)
            if isinstance(found, str):
                assert MODULES[0] in found
            else:  # a tensor that says nothing of the weight
                assert torch.equal(found[MODULES[0]], expected), name


@every_wire
def test_huge_metadata_are_read_over(sample: Sample, tmp_path: Path) -> None:
    sample.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata({**(file.metadata() or {}), "note": "x" * 2_000_000})(tmp_path / "model.safetensors")
    assert set(read_all(tmp_path)) == set(MODULES)


# ------------------------------------------------------------------------------------------------- shards and paths


def shard(sample: Sample, folder: Path, index: Callable[[dict[str, str]], Any] = lambda weight_map: None) -> Path:
    """Save in two shards; `index` may change the map of names to files."""
    sample.save(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        part = dict(list(sample.tensors.items())[number::2])
        save_file(part, folder / f"part{number}.safetensors", metadata={"format": "pt", **sample.metadata})
        weight_map |= dict.fromkeys(part, f"part{number}.safetensors")
    index(weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@every_wire
def test_shards_are_read(sample: Sample, tmp_path: Path) -> None:
    assert set(read_all(shard(sample, tmp_path))) == set(MODULES)


@every_wire
@pytest.mark.parametrize(
    "path", ["../a.safetensors", "/etc/passwd", "..", ".", "", "sub/part0.safetensors", "link/part0.safetensors"]
)
def test_a_shard_outside_the_folder_is_refused(path: str, sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    folder = shard(sample, tmp_path / "model", lambda names: names.update({f"{MODULES[0]}.x": path}))
    (folder / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match="leaves the folder"):
        read_all(folder)


@every_wire
def test_a_link_to_something_else_is_no_shard(sample: Sample, tmp_path: Path) -> None:
    folder = shard(sample, tmp_path)
    (folder / "part0.safetensors").unlink()
    (folder / "part0.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="part0"):
        read_all(folder)


@every_wire
def test_files_of_a_cache_are_links(sample: Sample, tmp_path: Path) -> None:
    folder = sample.save(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / "0123")
    (folder / "model.safetensors").symlink_to("../blobs/0123")
    assert set(read_all(folder)) == set(MODULES)


@every_wire
def test_a_missing_shard_is_named(sample: Sample, tmp_path: Path) -> None:
    (shard(sample, tmp_path) / "part1.safetensors").unlink()
    with pytest.raises(FormatError, match=r"part1\.safetensors: can't be read"):
        read_all(tmp_path)


@every_wire
def test_a_tensor_that_its_shard_lacks_is_named(sample: Sample, tmp_path: Path) -> None:
    shard(sample, tmp_path, lambda names: names.update(ghost="part0.safetensors"))
    with pytest.raises(FormatError, match=r"ghost of part0\.safetensors: the index lists a tensor"):
        read_all(tmp_path)


@every_wire
def test_a_tensor_in_two_shards_is_named(sample: Sample, tmp_path: Path) -> None:
    shard(sample, tmp_path)
    both = dict(list(sample.tensors.items())[0::2]) | dict(list(sample.tensors.items())[1:2])
    save_file(both, tmp_path / "part0.safetensors", metadata=sample.metadata or None)
    with pytest.raises(FormatError, match=r"part0\.safetensors: a shard holds a tensor that the index doesn't"):
        read_all(tmp_path)


@every_wire
def test_an_unlisted_tensor_is_named(sample: Sample, tmp_path: Path) -> None:
    shard(sample, tmp_path, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(FormatError, match=r"model\.norm\.weight of part0\.safetensors: a shard holds"):
        read_all(tmp_path)


@every_wire
def test_a_shard_of_another_revision_is_refused(sample: Sample, tmp_path: Path) -> None:
    shard(sample, tmp_path)
    save_file({"model.other.weight": torch.ones(2)}, tmp_path / "part1.safetensors")
    with pytest.raises(FormatError, match="the index lists a tensor that its shard lacks"):
        read_all(tmp_path)


@every_wire
@pytest.mark.parametrize("weight_map", [None, [], "a", {"a": 3}, {"a": None}, {"a": ["b"]}], ids=str)
def test_an_index_that_maps_nothing(weight_map: Any, sample: Sample, tmp_path: Path) -> None:
    shard(sample, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError):
        read_all(tmp_path)


@every_wire
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_with_the_way_out(name: str, sample: Sample, tmp_path: Path) -> None:
    (sample.save(tmp_path) / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(FormatError, match="convert them to safetensors"):
        read_all(tmp_path)


# ----------------------------------------------------------------------------------------------------- configuration


def write_config(folder: Path, quantization: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**MODEL, "quantization_config": quantization}))


@every_wire
@pytest.mark.parametrize("method", ["zip", "", None, 4, ["gptq"], {"a": 1}], ids=str)
def test_an_unknown_method_is_refused(method: Any, sample: Sample, tmp_path: Path) -> None:
    flags = {"load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"}
    config = {name: value for name, value in sample.config.items() if name not in flags}
    write_config(sample.save(tmp_path), {**config, "quant_method": method})
    with pytest.raises(FormatError):
        read_all(tmp_path)


@every_wire
@pytest.mark.parametrize("other", sorted(ONE_EACH))
def test_the_method_of_another_format_gives_no_weight(other: str, sample: Sample, tmp_path: Path) -> None:
    """Either it is refused, or what is read is the same number for number (GPTQ and AWQ share names)."""
    if ONE_EACH[other].wire.name == sample.wire.name:
        return
    write_config(sample.save(tmp_path), ONE_EACH[other].config)
    with pytest.raises(LowbitError):
        read_all(tmp_path)


_BAD = [0, -2, 33, 4.5, "4", True, None, [], {}, 2**70, float("inf"), "x" * 10**5]
_LEFT_OUT = {"quant_method", "meta"}


@every_wire
def test_bad_values_everywhere_in_the_config(sample: Sample, tmp_path: Path) -> None:
    """Each value of the config, replaced by each bad one: refused, or read as weights of the right shape."""
    sample.save(tmp_path)
    for key in sample.config:
        for value in _BAD:
            if key in _LEFT_OUT:
                continue
            write_config(tmp_path, {**sample.config, key: value})
            found = attempt(tmp_path)
            if isinstance(found, str):
                assert len(found) < 3000
            else:
                assert {tuple(weight.shape) for weight in found.values()} == {(64, 128)}


@every_wire
@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 10**5, '{"quantization_config": []}'])
def test_a_config_that_is_no_object(text: str, sample: Sample, tmp_path: Path) -> None:
    (sample.save(tmp_path) / "config.json").write_text(text)
    with pytest.raises(FormatError):
        read_all(tmp_path)


@every_wire
def test_a_config_of_a_gigabyte(sample: Sample, tmp_path: Path) -> None:
    with (sample.save(tmp_path) / "config.json").open("r+b") as file:
        file.truncate(2**30)
    with pytest.raises(FormatError, match="too large"):
        read_all(tmp_path)
    with pytest.raises(FormatError, match="too large"):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path)
