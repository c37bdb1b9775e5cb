"""GGUF files: header, metadata and tensor table, checked against the file's size before anything is taken from it.

Layout (little-endian): magic, version, counts of tensors and of key-value pairs; the pairs; one entry per tensor (name,
dimensions with the fastest first, type, offset); padding to ``general.alignment``; the tensors, each padded likewise.
The reader is our own: sizes come from strangers, and every field is compared with what is left of the file.
"""

from __future__ import annotations

import mmap
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.gguf.types import DTYPES, GONE, GgmlType
from lowbit.wire.gguf.values import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    SCALARS,
    VERSIONS,
    WIDTHS,
    ValueType,
)

_LFS: Final = b"version https://git-lfs"
_HEADER: Final = 24  # magic, version, two counts
_SMALLEST_PAIR: Final = 8 + 1 + 4 + 1
_SMALLEST_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8
_MAX_DIMS: Final = 4
_MAX_NAME: Final = 1 << 16
_MAX_DEPTH: Final = 4  # of arrays in arrays; none is known to be deeper than one
# Python's objects are larger than the bytes they come from; the largest vocabularies have a few million entries.
_MAX_VALUES: Final = 1 << 23
_NO_RESERVE: Final = 0x4000  # MAP_NORESERVE, which Python has no name for before 3.13
_LENGTH: Final = struct.Struct("<Q")
_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table.

    Attributes:
        shape: in torch's order, the fastest axis last: a linear layer's weight is ``(out, in)``.
        offset: from the start of the file.
        nbytes: without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """How many rows there are over all leading axes."""
        rows = 1
        for side in self.shape[:-1]:
            rows *= side
        return rows


class GgufFile:
    """One GGUF file, memory-mapped.

    Attributes:
        path: of the file.
        version: 2 or 3.
        alignment: of the tensors, in bytes.
        metadata: the values by key: bool, int, float, str, or (nested) lists of them.
        types: how each value is stored; for arrays ``(ARRAY, element type)``.
        tensors: the tensor table by name, in the order of the file.

    Raises:
        FormatError: the file is not a valid GGUF file; says where and why.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = _map(self.path)
        try:
            header = _Header(self._map)
        except FormatError as error:
            raise error.located(file=str(self.path)) from error
        self.version, self.alignment = header.version, header.alignment
        self.metadata: dict[str, Any] = header.metadata
        self.types: dict[str, tuple[ValueType, ...]] = header.types
        self.tensors: dict[str, TensorInfo] = header.tensors
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def raw(self, name: str) -> Tensor:
        """A tensor's bytes, ``uint8 [rows, bytes per row]``: a view of the mapping, nothing is copied or read yet.

        Writing to it doesn't change the file.
        """
        info = self.tensors[name]
        stored = self._bytes[info.offset : info.offset + info.nbytes]
        return stored.view(info.rows, info.nbytes // info.rows) if info.rows else stored.view(0, 0)

    def dense(self, name: str) -> Tensor:
        """A tensor of plain numbers (F32, F16, BF16, F64, integers) in its shape and dtype; a view of the mapping
        where the file's alignment allows it.

        Raises:
            FormatError: the tensor is quantized.
        """
        info = self.tensors[name]
        if not info.type.dense:
            raise FormatError(
                "the tensor is quantized", file=str(self.path), tensor=name, found=info.type.name, expected="F32, F16.."
            )
        raw, dtype = self.raw(name).view(-1), DTYPES[info.type]
        aligned = raw if info.offset % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).view(info.shape)


class Gguf:
    """A model in one GGUF file or in several parts, seen as one.

    Attributes:
        path: of the file that was opened.
        parts: all files, in order.
        metadata: of the first part, without ``split.*``.
        types: how each value is stored; for arrays ``(ARRAY, element type)``.
        tensors: of all parts, by name.
    """

    def __init__(self, path: Path, parts: list[GgufFile]) -> None:
        self.path, self.parts = path, parts
        first = parts[0]
        self.metadata = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
        self.types = {key: first.types[key] for key in self.metadata}
        self.alignment = first.alignment
        self.tensors: dict[str, TensorInfo] = {}
        self._part_of: dict[str, GgufFile] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise FormatError(
                        "two parts hold the same tensor", file=str(part.path), tensor=name,
                        found=str(self._part_of[name].path),
                    )  # fmt: skip
                self.tensors[name], self._part_of[name] = info, part

    def raw(self, name: str) -> Tensor:
        """See :meth:`GgufFile.raw`."""
        return self._part_of[name].raw(name)

    def dense(self, name: str) -> Tensor:
        """See :meth:`GgufFile.dense`."""
        return self._part_of[name].dense(name)

    def file_of(self, name: str) -> Path:
        return self._part_of[name].path


def open_gguf(path: str | Path) -> Gguf:
    """Open a GGUF file, and where it is one of ``name-00001-of-0000N.gguf`` all N.

    Raises:
        FormatError: a file is damaged, a part is missing, or the parts don't belong together.
    """
    path = Path(path)
    opened = GgufFile(path)
    count = _value(opened, "split.count", 1)
    if count <= 1:
        return Gguf(path, [opened])
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            "the name of a part doesn't say which it is", file=str(path), found=path.name,
            expected=f"<name>-00001-of-{count:05d}.gguf",
        )  # fmt: skip
    number = int(match["number"])
    names = [path.with_name(f"{match['stem']}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
    if missing := [name.name for name in names if not name.is_file()]:
        raise FormatError("parts are missing", file=str(path), found=missing[:4], expected=f"{count} files")
    parts = [opened if index == number else GgufFile(name) for index, name in enumerate(names, start=1)]
    _check_parts(parts)
    return Gguf(path, parts)


def _check_parts(parts: list[GgufFile]) -> None:
    total = sum(len(part.tensors) for part in parts)
    for index, part in enumerate(parts):
        for key, expected in (("split.no", index), ("split.count", len(parts)), ("split.tensors.count", total)):
            if _value(part, key, None if key == "split.no" else expected) != expected:
                raise FormatError(
                    f"{key} contradicts the other parts", file=str(part.path), found=part.metadata.get(key),
                    expected=expected,
                )  # fmt: skip


def _value(file: GgufFile, key: str, default: int | None) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise FormatError(f"{key} is not a count", file=str(file.path), found=repr(value)[:80])
    return value


def _map(path: Path) -> mmap.mmap:
    """Map a file, private to this process: torch wants memory that could be written to.

    Linux would refuse to map a file larger than the memory that way, unless it is told to reserve none.
    """
    try:
        if not path.is_file():
            raise FormatError("there is no such file", file=str(path))
        with path.open("rb") as file:
            start = file.read(len(_LFS))
            if start == _LFS:
                raise FormatError("this is a git-lfs pointer, not the weights: run 'git lfs pull'", file=str(path))
            if path.stat().st_size < _HEADER:
                raise FormatError("the file ends within its header", file=str(path), found=path.stat().st_size)
            if sys.platform == "linux":
                return mmap.mmap(file.fileno(), 0, _NO_RESERVE | mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise FormatError(f"can't be read: {error.strerror or error}", file=str(path)) from error


def parse_header(data: bytes | mmap.mmap) -> _Header:
    """Read the header of a GGUF file that is already in memory.

    Raises:
        FormatError: it is not a valid one.
    """
    return _Header(data)


class _Header:
    """Everything before the tensors, read in one pass; offsets of the table become offsets in the file."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._cursor = _Cursor(data)
        self.metadata: dict[str, Any] = {}
        self.types: dict[str, tuple[ValueType, ...]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.version = self._check_start()
        tensor_count = self._count("tensors", _SMALLEST_TENSOR)
        pair_count = self._count("key-value pairs", _SMALLEST_PAIR)
        for _ in range(pair_count):
            self._read_pair()
        self.alignment = self._check_alignment()
        entries = [self._read_tensor() for _ in range(tensor_count)]
        self._place(entries)

    def _check_start(self) -> int:
        magic = bytes(self._cursor.take(4, "magic"))
        if magic != MAGIC:
            raise FormatError("is not a GGUF file", found=magic, expected=MAGIC)
        version = self._cursor.integer("version", "I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = "; the file is big-endian, which lowbit doesn't read" if swapped in VERSIONS else ""
            raise FormatError(f"unknown version of GGUF{hint}", found=version, expected="2 or 3")
        return version

    def _count(self, what: str, smallest: int) -> int:
        count = self._cursor.integer(f"number of {what}", "Q")
        if count * smallest > self._cursor.left:
            raise FormatError(f"more {what} than the file has room for", found=count)
        return count

    def _read_pair(self) -> None:
        key = self._cursor.text("a key", limit=_MAX_NAME)
        if not key:
            raise FormatError("an empty key in the metadata")
        if key in self.metadata:
            raise FormatError("a key stands twice in the metadata", tensor=key)
        try:
            kind = self._value_type()
            self.types[key] = (kind,)
            if kind is ValueType.ARRAY:
                self.metadata[key], element = self._array(1)
                self.types[key] = (kind, element)
            else:
                self.metadata[key] = self._scalar(kind)
        except FormatError as error:
            raise error.located(tensor=key) from error

    def _value_type(self) -> ValueType:
        number = self._cursor.integer("type of a value", "I")
        if number > max(ValueType):
            raise FormatError("unknown type of a metadata value", found=number, expected=f"0..{max(ValueType)}")
        return ValueType(number)

    def _scalar(self, kind: ValueType) -> bool | int | float | str:
        if kind is ValueType.STRING:
            return self._cursor.text("a string")
        (value,) = self._numbers(kind, 1)
        return value

    def _array(self, depth: int) -> tuple[list[Any], ValueType]:
        kind = self._value_type()
        count = self._cursor.integer("length of an array", "Q")
        smallest = {ValueType.STRING: 8, ValueType.ARRAY: 12}.get(kind) or WIDTHS[kind]
        if count * smallest > self._cursor.left:
            raise FormatError("an array is longer than the rest of the file", found=count)
        self._cursor.spend(count)
        if kind is ValueType.STRING:
            return self._cursor.texts(count, "a string"), kind
        if kind is not ValueType.ARRAY:
            return self._numbers(kind, count), kind
        if depth == _MAX_DEPTH:
            raise FormatError("arrays are nested too deep", expected=f"at most {_MAX_DEPTH}")
        return [self._array(depth + 1)[0] for _ in range(count)], kind

    def _numbers(self, kind: ValueType, count: int) -> list[Any]:
        stored = self._cursor.take(count * WIDTHS[kind], "a value")
        if kind is ValueType.BOOL and any(byte > 1 for byte in stored):
            raise FormatError("a bool is neither 0 nor 1", found=max(stored))
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", stored))

    def _check_alignment(self) -> int:
        value = self.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        stored = self.types.get(ALIGNMENT_KEY, (ValueType.UINT32,))
        if stored != (ValueType.UINT32,):
            raise FormatError("wrong type of a value", tensor=ALIGNMENT_KEY, found=stored[0].name, expected="UINT32")
        if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise FormatError(
                "not an alignment", tensor=ALIGNMENT_KEY, found=value, expected=f"a power of two up to {MAX_ALIGNMENT}"
            )
        return int(value)

    def _read_tensor(self) -> TensorInfo:
        """One entry; its offset is still relative to the tensors' start."""
        name = self._cursor.text("a tensor's name", limit=_MAX_NAME)
        try:
            if not name or name in self.tensors:
                raise FormatError("an empty name" if not name else "a tensor stands twice in the table")
            dims = self._cursor.integer("number of dimensions", "I")
            if not 1 <= dims <= _MAX_DIMS:
                raise FormatError("wrong number of dimensions", found=dims, expected=f"1..{_MAX_DIMS}")
            sides = [self._cursor.integer("dimension", "q") for _ in range(dims)]
            kind = _tensor_type(self._cursor.integer("type of a tensor", "I"))
            info = TensorInfo(
                name, tuple(reversed(sides)), kind, self._cursor.integer("offset", "Q"),
                _tensor_bytes(sides, kind, self._cursor.size),
            )  # fmt: skip
        except FormatError as error:
            raise error.located(tensor=name or None) from error
        self.tensors[name] = info
        return info

    def _place(self, entries: list[TensorInfo]) -> None:
        """Check that the tensors lie in the file, aligned, and not over one another."""
        start = -(-self._cursor.position // self.alignment) * self.alignment
        size, end, before = self._cursor.size, 0, ""
        for info in sorted(entries, key=lambda info: (info.offset, info.nbytes)):
            if info.offset % self.alignment:
                raise FormatError(
                    "a tensor is not aligned", tensor=info.name, found=info.offset, expected=self.alignment
                )
            if start + info.offset + info.nbytes > size:
                raise FormatError(
                    "a tensor reaches past the end of the file", tensor=info.name,
                    found=start + info.offset + info.nbytes, expected=f"at most {size}",
                )  # fmt: skip
            if info.offset < end:
                raise FormatError("two tensors overlap", tensor=info.name, found=before)
            end, before = info.offset + info.nbytes, info.name
        for info in entries:
            self.tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start + info.offset, info.nbytes)


def _tensor_type(number: int) -> GgmlType:
    try:
        return GgmlType(number)
    except ValueError:
        raise FormatError(
            "a type of tensor that lowbit doesn't read", found=f"{number} ({GONE.get(number, 'unknown')})"
        ) from None


def _tensor_bytes(sides: list[int], kind: GgmlType, limit: int) -> int:
    """Size of a tensor; Python's integers don't overflow, so one comparison with the file's size covers it."""
    if min(sides) < 0:
        raise FormatError("a negative dimension", found=sides)
    if sides[0] % kind.block_elements:
        raise FormatError(
            f"a row is not a whole number of {kind.name} blocks", found=sides[0],
            expected=f"a multiple of {kind.block_elements}",
        )  # fmt: skip
    nbytes = kind.row_bytes(sides[0])
    for side in sides[1:]:
        nbytes *= side
    if nbytes > limit or max(sides) > max(limit, 1) * kind.block_elements:
        raise FormatError("a tensor is larger than the file", found=f"{sides} of {kind.name}", expected=limit)
    return nbytes


class _Cursor:
    """Takes fields from the front of a buffer, never more than there is."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data, self.position, self.size = data, 0, len(data)
        self._values = _MAX_VALUES

    @property
    def left(self) -> int:
        return self.size - self.position

    def spend(self, values: int) -> None:
        """Count values of arrays, which take more memory than the file does."""
        self._values -= values
        if self._values < 0:
            raise FormatError("the metadata has too many values", expected=f"at most {_MAX_VALUES}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise FormatError(f"the file ends within {what}", found=f"{self.left} bytes", expected=count)
        self.position += count
        return self._data[self.position - count : self.position]

    def integer(self, what: str, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]
        return value

    def text(self, what: str, limit: int | None = None) -> str:
        (stored,) = self._strings(1, what, limit)
        return _decoded(stored, what)

    def texts(self, count: int, what: str) -> list[str]:
        return [_decoded(stored, what) for stored in self._strings(count, what)]

    def _strings(self, count: int, what: str, limit: int | None = None) -> list[bytes]:
        """Strings behind their lengths; a plain loop, since vocabularies have hundreds of thousands of them."""
        data, position, size = self._data, self.position, self.size
        found = []
        for _ in range(count):
            start = position + _LENGTH.size
            if start > size:
                raise FormatError(f"the file ends within the length of {what}", found=f"{size - position} bytes")
            position = start + _LENGTH.unpack_from(data, position)[0]
            if position > size or (limit is not None and position - start > limit):
                most = size - start if limit is None else min(limit, size - start)
                raise FormatError(f"{what} is too long", found=position - start, expected=f"at most {most}")
            found.append(data[start:position])
        self.position = position
        return found


def _decoded(stored: bytes, what: str) -> str:
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8", found=stored[:40]) from error
