"""Importance matrices that are damaged or made to harm: one `FormatError` each, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.wire.gguf import Entry, GgmlType, write_gguf
from lowbit.wire.gguf.imatrix import read_imatrix

KIND = {"general.type": "imatrix"}


def refused(path: Path, match: str) -> FormatError:
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=match) as error:
        read_imatrix(path)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KB
    assert error.value.file == str(path)
    return error.value


def old(folder: Path, content: bytes, match: str) -> None:
    (folder / "x.dat").write_bytes(content)
    refused(folder / "x.dat", match)


def entry(name: bytes = b"a", calls: int = 1, values: bytes = struct.pack("<f", 1), count: int | None = None) -> bytes:
    return (
        struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values) // 4 if count is None else count)
        + values
    )  # fmt: skip


def gguf(folder: Path, match: str, tensors: dict[str, torch.Tensor], **metadata: object) -> None:
    kinds = {torch.float32: GgmlType.F32, torch.float16: GgmlType.F16}
    entries = [Entry(n, tuple(t.shape), kinds[t.dtype], lambda t=t: t) for n, t in tensors.items()]
    write_gguf(folder / "x.gguf", KIND | {key.replace("__", "."): value for key, value in metadata.items()}, entries)
    refused(folder / "x.gguf", match)


def test_the_entry_that_the_others_are_made_from_is_valid(tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(struct.pack("<i", 1) + entry())
    assert read_imatrix(tmp_path / "x.dat").entries["a"].squares.tolist() == [1]


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path, "no such file")
    refused(tmp_path / "missing", "no such file")
    refused(Path("/dev/zero"), "no such file")
    old(tmp_path, b"", "ends within")
    old(tmp_path, b"\1\0", "ends within")
    old(tmp_path, b"\0" * 4, "empty")
    old(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "more than the file has room for")


def test_a_large_file_of_something_else_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.dat").open("wb") as file:
        file.write(b"\xff\xff\xff\x7f")
        os.truncate(file.fileno(), 1 << 33)
    refused(tmp_path / "x.dat", "more than the file has room for")


@pytest.mark.parametrize("count", [-1, 2, 1000, 2**31 - 1])
def test_counts_of_entries(count: int, tmp_path: Path) -> None:
    old(tmp_path, struct.pack("<i", count) + entry(), "more than the file has room for|ends within")


@pytest.mark.parametrize("count", [-1, 0, 2, 2**31 - 1])
def test_counts_of_values(count: int, tmp_path: Path) -> None:
    old(tmp_path, struct.pack("<i", 1) + entry(count=count), "more than the file has room for|without values")


def test_names(tmp_path: Path) -> None:
    one, two = struct.pack("<i", 1), struct.pack("<i", 2)
    old(tmp_path, one + entry(b"") + bytes(8), "without a name")
    old(tmp_path, one + entry(b"\xff\xff"), "not UTF-8")
    old(tmp_path, two + entry() + entry(), "stands twice")
    old(tmp_path, one + struct.pack("<i", 2**31 - 1) + bytes(64), "too long")
    old(tmp_path, one + struct.pack("<i", -1) + bytes(64), "too long")
    old(tmp_path, one + struct.pack("<i", 4000) + bytes(64), "ends within")


def test_numbers_that_are_no_means(tmp_path: Path) -> None:
    for number in (float("nan"), float("inf"), -1.0):
        old(tmp_path, struct.pack("<i", 1) + entry(values=struct.pack("<f", number)), "negative or not finite")
        gguf(tmp_path, "negative or not finite", {"a.in_sum2": torch.tensor([[number]]), "a.counts": torch.ones(1, 1)})
        gguf(tmp_path, "negative or not finite", {"a.in_sum2": torch.ones(1, 1), "a.counts": torch.tensor([[number]])})
    old(tmp_path, struct.pack("<i", 1) + entry(calls=-1), "without values or calls")


def test_what_follows(tmp_path: Path) -> None:
    start = struct.pack("<i", 1) + entry()
    old(tmp_path, start + b"\1", "ends within the number of chunks")
    old(tmp_path, start + struct.pack("<i", -1), "negative number of chunks")
    old(tmp_path, start + struct.pack("<ii", 1, 2**30), "too long")
    old(tmp_path, start + struct.pack("<ii", 1, 0) + b"more", "bytes follow")


def test_gguf_files_of_something_else(tmp_path: Path) -> None:
    ones = {"a.in_sum2": torch.ones(1, 4), "a.counts": torch.ones(1, 1)}
    gguf(tmp_path, "not an importance matrix", ones, general__type="model")
    gguf(tmp_path, "no importance matrix has", ones | {"a.weight": torch.ones(2)})
    gguf(tmp_path, "not a list of names", ones, imatrix__datasets=[1, 2])
    gguf(tmp_path, "not a count", ones, imatrix__chunk_count=-1)
    gguf(tmp_path, "not a count", ones, imatrix__chunk_size=1.5)
    gguf(tmp_path, "is empty", {"a.in_sum": torch.ones(2)})


def test_gguf_tensors_that_contradict_one_another(tmp_path: Path) -> None:
    sums, counts = torch.ones(2, 4), torch.ones(2, 1)
    gguf(tmp_path, "missing", {"a.in_sum2": sums})
    gguf(tmp_path, "counts without sums", {"a.in_sum2": sums, "a.counts": counts, "b.counts": counts})
    gguf(tmp_path, "belong together", {"a.in_sum2": sums, "a.counts": torch.ones(3, 1)})
    gguf(tmp_path, "wrong type or shape", {"a.in_sum2": torch.ones(2, 0), "a.counts": counts})
    gguf(tmp_path, "wrong type or shape", {"a.in_sum2": sums.half(), "a.counts": counts})
    gguf(tmp_path, "wrong type or shape", {"a.in_sum2": sums.view(1, 2, 4), "a.counts": counts})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_and_changed_files_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    tail = struct.pack("<ii", 3, 4) + b"text"
    content = bytearray(struct.pack("<i", 2) + entry() + entry(b"blk.0.attn_q.weight", 2, bytes(32)) + tail)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.dat").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read = read_imatrix(tmp_path / "x.dat")
    except FormatError:
        return
    for found in read.entries.values():
        assert bool(torch.isfinite(found.squares).all()) and bool((found.squares >= 0).all())
