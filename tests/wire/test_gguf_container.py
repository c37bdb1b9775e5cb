"""GGUF's container: what was written is read back, in one file or several, and nothing half-written stays behind."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.wire.gguf import Entry, GgmlType, GgufFile, Typed, ValueType, open_gguf, write_gguf
from lowbit.wire.gguf.container import parse_header
from lowbit.wire.gguf.types import DTYPES

LIMITS = {
    ValueType.UINT8: (0, 2**8 - 1),
    ValueType.INT8: (-(2**7), 2**7 - 1),
    ValueType.UINT16: (0, 2**16 - 1),
    ValueType.INT16: (-(2**15), 2**15 - 1),
    ValueType.UINT32: (0, 2**32 - 1),
    ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1),
    ValueType.INT64: (-(2**63), 2**63 - 1),
}


def entries(count: int = 5) -> list[Entry]:
    made = []
    for number in range(count):
        values = torch.arange(3 * 32, dtype=torch.float32).view(3, 32) + number
        made.append(Entry(f"blk.{number}.weight", (3, 32), GgmlType.F32, lambda values=values: values))
    return made


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 1, 8, 4096])
def test_tensors_of_every_plain_type(version: int, alignment: int | None, tmp_path: Path) -> None:
    kinds = [kind for kind in GgmlType if kind.dense]
    tensors = {}
    for number, kind in enumerate(kinds):
        tensors[kind.name] = (torch.randn(2, 3, 5 + number) * 50).to(DTYPES[kind])
    metadata = {} if alignment is None else {"general.alignment": alignment}
    made = [
        Entry(name, tuple(value.shape), GgmlType[name], lambda value=value: value) for name, value in tensors.items()
    ]
    write_gguf(tmp_path / "x.gguf", metadata, made, version=version)
    read = open_gguf(tmp_path / "x.gguf")
    assert (read.parts[0].version, read.alignment) == (version, alignment or 32)
    assert list(read.tensors) == list(tensors)
    for name, value in tensors.items():
        assert read.tensors[name].offset % read.alignment == 0
        assert torch.equal(read.dense(name), value) and read.dense(name).dtype == value.dtype


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_type(data: st.DataObject, tmp_path: Path) -> None:
    metadata: dict[str, Any] = {}
    for kind, (low, high) in LIMITS.items():
        metadata[kind.name] = Typed(data.draw(st.integers(low, high)), kind)
        metadata[f"{kind.name}s"] = Typed(data.draw(st.lists(st.integers(low, high), max_size=3)), kind)
    metadata["float"] = data.draw(st.floats(width=32, allow_nan=False))
    metadata["double"] = Typed(data.draw(st.floats(allow_nan=False)), ValueType.FLOAT64)
    words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    metadata["text"], metadata["texts"] = data.draw(words), data.draw(st.lists(words, min_size=1, max_size=3))
    metadata["plain"] = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
    metadata["nested"] = [[1, 2], [], [3]]
    metadata["bools"] = data.draw(st.lists(st.booleans(), min_size=1, max_size=3))
    write_gguf(tmp_path / "x.gguf", metadata, [])
    read = GgufFile(tmp_path / "x.gguf")
    assert read.metadata == {key: getattr(value, "value", value) for key, value in metadata.items()}
    for key, value in metadata.items():
        if isinstance(value, Typed):
            assert read.types[key][-1] is value.kind


def test_numbers_get_the_types_that_readers_expect(tmp_path: Path) -> None:
    metadata = {"a": 1, "b": -1, "c": 2**32, "d": [1, 2], "e": [2**31, 1], "f": [1, 0.5], "g": [], "h": [-1, 2**40]}
    write_gguf(tmp_path / "x.gguf", metadata, [])
    found = [kinds[-1].name for kinds in GgufFile(tmp_path / "x.gguf").types.values()]
    assert found == ["UINT32", "INT32", "UINT64", "INT32", "UINT32", "FLOAT32", "INT32", "INT64"]


@pytest.mark.parametrize(
    "value", [None, {}, object(), [1, "a"], [None], 2**64, Typed("a", ValueType.INT8), Typed(300, ValueType.UINT8)]
)
def test_values_that_gguf_does_not_hold(value: object, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        write_gguf(tmp_path / "x.gguf", {"key": value}, entries())
    assert list(tmp_path.iterdir()) == []


def test_parts(tmp_path: Path) -> None:
    names = write_gguf(tmp_path / "m.gguf", {"a": "b", "split.other": 1}, entries(), part_bytes=800)
    assert [name.name for name in names] == [f"m-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    for name in names:
        read = open_gguf(name)
        assert read.metadata == {"a": "b"} and len(read.parts) == 3
        assert list(read.tensors) == [f"blk.{number}.weight" for number in range(5)]
        assert read.file_of("blk.4.weight") == names[2]
        assert float(read.dense("blk.4.weight")[2, 31]) == 99
    whole = write_gguf(tmp_path / "m.gguf", {"a": "b"}, entries(), part_bytes=10**9)
    assert whole == [tmp_path / "m.gguf"] and len(open_gguf(whole[0]).parts) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a": "old"}, entries())
    path.chmod(0o644)

    def broken() -> bytes:
        raise OSError("disk full")

    for bad in (
        Entry("z", (1, 32), GgmlType.F32, broken),
        Entry("z", (1, 32), GgmlType.F32, lambda: b"short"),
        Entry("z", (1, 33), GgmlType.Q8_0, lambda: bytes(34)),
        Entry("z", (1,) * 5, GgmlType.F32, lambda: bytes(4)),
        Entry("z", (), GgmlType.F32, lambda: bytes(4)),
    ):
        with pytest.raises((OSError, FormatError)):
            write_gguf(path, {"a": "new"}, [*entries(), bad])
        with pytest.raises((OSError, FormatError)):
            write_gguf(path, {"a": "new"}, [*entries(), bad], part_bytes=500)
    assert [found.name for found in tmp_path.iterdir()] == ["x.gguf"]
    assert GgufFile(path).metadata == {"a": "old"}


def test_a_file_is_saved_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a": "old"}, entries())
    old = open_gguf(path)
    kept = [Entry(name, info.shape, info.type, lambda name=name: old.raw(name)) for name, info in old.tensors.items()]
    write_gguf(path, {"a": "new"}, kept[1:])
    assert float(old.dense("blk.0.weight")[0, 1]) == 1
    assert len(open_gguf(path).tensors) == 4 and open_gguf(path).metadata == {"a": "new"}
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "x.gguf").stat().st_mode)


def test_raw_is_a_view_that_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, entries(1))
    before = path.read_bytes()
    file = GgufFile(path)
    assert file.raw("blk.0.weight").data_ptr() == file.raw("blk.0.weight").data_ptr()
    file.raw("blk.0.weight").fill_(255)
    assert path.read_bytes() == before
    write_gguf(path, {}, [Entry("q", (1, 32), GgmlType.Q8_0, lambda: bytes(34))])
    with pytest.raises(FormatError, match="is quantized"):
        GgufFile(path).dense("q")


def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    """Sparse: the last tensor lies a tebibyte behind the first, and nothing is in between."""
    path, far = tmp_path / "x.gguf", 1 << 40
    write_gguf(path, {}, entries(2))
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.1.weight") + len("blk.1.weight") + 4 + 16 + 4
    content[at : at + 8] = far.to_bytes(8, "little")
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(len(content) - 2 * 384 + far + 384)
    assert float(open_gguf(path).dense("blk.1.weight").sum()) == 0
    assert float(open_gguf(path).dense("blk.0.weight")[2, 31]) == 95


def test_a_header_is_parsed_from_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"a": [1, 2]}, entries(2))
    header = parse_header((tmp_path / "x.gguf").read_bytes())
    assert header.metadata == {"a": [1, 2]} and list(header.tensors) == ["blk.0.weight", "blk.1.weight"]


@pytest.mark.parametrize("value", [0, 3, 2**31, "32", True, Typed(32, ValueType.UINT64)])
def test_alignments_that_no_reader_takes_are_not_written(value: object, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not an alignment"):
        write_gguf(tmp_path / "x.gguf", {"general.alignment": value}, entries())


def test_other_versions_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such version"):
        write_gguf(tmp_path / "x.gguf", {}, [], version=1)
