"""Write GGUF files: the table first, from shapes and types alone, then one tensor after the other."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.gguf.types import GgmlType
from lowbit.wire.gguf.values import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    SCALARS,
    VERSIONS,
    Typed,
    ValueType,
    kind_of,
)

_CHUNK: Final = 1 << 24


class Entry(NamedTuple):
    """A tensor to be written.

    Attributes:
        shape: in torch's order, the fastest axis last.
        data: called once, when the tensor's turn comes; gives all its bytes, as bytes or as a tensor of any shape.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    data: Callable[[], bytes | Tensor]


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, tuple[int, ...], GgmlType, Callable[[], bytes | Tensor]]],
    *,
    version: int = 3,
    part_bytes: int | None = None,
) -> list[Path]:
    """Write a model to one file, or to parts of about `part_bytes` bytes of tensors each.

    Every file is written under a temporary name and renamed when it is whole; parts are renamed after the last of them.

    Args:
        path: of the file; parts are called ``<stem>-00001-of-0000N.gguf`` beside it.
        metadata: in the order in which it is stored. Plain values get the types of :func:`values.kind_of`;
            ``general.alignment`` (UINT32) also sets the alignment.
        tensors: :class:`Entry` or the same as plain tuples.
        version: 3, or 2 for old readers.
        part_bytes: None for one file.

    Returns:
        The files written.

    Raises:
        FormatError: a value or a tensor that GGUF can't hold, or bytes of another length than the table says.
    """
    if version not in VERSIONS:
        raise FormatError("GGUF has no such version to write", found=version, expected="2 or 3")
    path = Path(path)
    parts = _split([Entry(*entry) for entry in tensors], part_bytes)
    if len(parts) == 1:
        names = [path]
    else:
        names = [path.with_name(f"{path.stem}-{n:05d}-of-{len(parts):05d}.gguf") for n in range(1, len(parts) + 1)]
    total = sum(map(len, parts))
    with contextlib.ExitStack() as unfinished:
        written = [
            _write_part(unfinished, name, _part_metadata(metadata, number, len(parts), total), part, version)
            for number, (name, part) in enumerate(zip(names, parts, strict=True))
        ]
        for temporary, name in zip(written, names, strict=True):
            temporary.replace(name)
    return names


def _split(entries: list[Entry], part_bytes: int | None) -> list[list[Entry]]:
    if part_bytes is None:
        return [entries]
    parts: list[list[Entry]] = [[]]
    room = part_bytes
    for entry in entries:
        nbytes = _nbytes(entry)
        if parts[-1] and nbytes > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(entry)
        room -= nbytes
    return parts


def _part_metadata(metadata: Mapping[str, Any], number: int, count: int, tensors: int) -> dict[str, Any]:
    """The first part says everything, the others only which they are."""
    if count == 1:
        return dict(metadata)
    split = {
        "split.no": Typed(number, ValueType.UINT16),
        "split.count": Typed(count, ValueType.UINT16),
        "split.tensors.count": Typed(tensors, ValueType.INT32),
    }
    if number == 0:
        return {**metadata, **split}
    return {key: metadata[key] for key in (ALIGNMENT_KEY,) if key in metadata} | split


def _write_part(
    unfinished: contextlib.ExitStack, path: Path, metadata: Mapping[str, Any], entries: list[Entry], version: int
) -> Path:
    """Write one file beside `path` under a temporary name, which is removed if anything fails before the rename."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    unfinished.callback(temporary.unlink, missing_ok=True)
    with os.fdopen(handle, "wb") as file:
        _write_file(file, metadata, entries, version)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())
    return temporary


def _write_file(file: IO[bytes], metadata: Mapping[str, Any], entries: list[Entry], version: int) -> None:
    alignment = _alignment(metadata)
    file.write(MAGIC + struct.pack("<IQQ", version, len(entries), len(metadata)))
    for key, value in metadata.items():
        file.write(_text(key))
        for piece in _value(key, value):
            file.write(piece)
    offset = 0
    for entry in entries:
        file.write(_table_entry(entry, offset))
        offset += _padded(_nbytes(entry), alignment)
    _pad(file, alignment)
    for entry in entries:
        _write_tensor(file, entry)
        _pad(file, alignment)


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    kind, value = (value.kind, value.value) if isinstance(value, Typed) else (ValueType.UINT32, value)
    if kind is not ValueType.UINT32 or type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise FormatError(
            "not an alignment", tensor=ALIGNMENT_KEY, found=repr(value), expected="a power of two, UINT32"
        )
    return value


def _table_entry(entry: Entry, offset: int) -> bytes:
    sides = tuple(reversed(entry.shape))
    return (
        _text(entry.name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides) + struct.pack("<IQ", entry.type, offset)
    )


def _nbytes(entry: Entry) -> int:
    if not 1 <= len(entry.shape) <= 4:
        raise FormatError("GGUF has tensors of 1 to 4 dimensions", tensor=entry.name, found=list(entry.shape))
    if entry.shape[-1] % entry.type.block_elements:
        raise FormatError(
            f"a row is not a whole number of {entry.type.name} blocks", tensor=entry.name, found=list(entry.shape),
            expected=f"a multiple of {entry.type.block_elements}",
        )  # fmt: skip
    nbytes = entry.type.row_bytes(entry.shape[-1])
    for side in entry.shape[:-1]:
        nbytes *= side
    return nbytes


def _write_tensor(file: IO[bytes], entry: Entry) -> None:
    data = entry.data()
    count = data.numel() * data.element_size() if isinstance(data, Tensor) else len(data)
    if count != _nbytes(entry):
        raise FormatError(
            "a tensor has another size than its shape and type say", tensor=entry.name, found=count,
            expected=_nbytes(entry),
        )  # fmt: skip
    for chunk in _chunks(data):
        file.write(chunk)


def _chunks(data: bytes | Tensor) -> Iterator[bytes | memoryview]:
    """The bytes in pieces: a tensor becomes bytes a piece at a time, not as a second copy."""
    if not isinstance(data, Tensor):
        yield memoryview(data)
        return
    flat = data.detach().cpu().contiguous().view(-1).view(torch.uint8)
    for piece in flat.split(_CHUNK):
        yield memoryview(piece.numpy())


def _value(key: str, value: object) -> Iterator[bytes]:
    kind, value = (value.kind, value.value) if isinstance(value, Typed) else (None, value)
    if isinstance(value, (list, tuple)):
        yield struct.pack("<I", ValueType.ARRAY)
        yield from _array(key, value, kind)
        return
    kind = kind_of(value) if kind is None else kind
    yield struct.pack("<I", kind)
    yield _scalars(key, [value], kind)


def _array(key: str, values: Sequence[Any], kind: ValueType | None) -> Iterator[bytes]:
    kind = _element_kind(key, values) if kind is None else kind
    yield struct.pack("<IQ", kind, len(values))
    if kind is ValueType.ARRAY:
        for value in values:
            yield from _array(key, value, None)
        return
    yield _scalars(key, values, kind)


def _element_kind(key: str, values: Sequence[Any]) -> ValueType:
    """What all elements can be written as: integers as the narrowest type that holds all, beside floats FLOAT32."""
    kinds = {kind_of(value, element=True) for value in values}
    if not kinds:
        return ValueType.INT32
    integers = {ValueType.INT32, ValueType.UINT32, ValueType.UINT64, ValueType.INT64}
    if len(kinds) > 1 and kinds <= integers:
        return ValueType.INT64 if min(values) < 0 else kind_of(max(values), element=True)
    if len(kinds) > 1 and kinds <= integers | {ValueType.FLOAT32}:
        return ValueType.FLOAT32
    if len(kinds) > 1:
        names = sorted(kind.name for kind in kinds)
        raise FormatError("the elements of an array have different types", tensor=key, found=names)
    return kinds.pop()


def _scalars(key: str, values: Sequence[Any], kind: ValueType) -> bytes:
    try:
        if kind is ValueType.STRING:
            return b"".join(map(_text, values))
        return struct.pack(f"<{len(values)}{SCALARS[kind]}", *values)
    except (struct.error, OverflowError, KeyError, AttributeError) as error:
        raise FormatError(
            f"a value can't be written as {kind.name}: {error}", tensor=key, found=repr(values)[:80]
        ) from error


def _text(text: str) -> bytes:
    stored = text.encode("utf-8")
    return struct.pack("<Q", len(stored)) + stored


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _umask() -> int:
    """The process' umask; there is no way to ask but to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
