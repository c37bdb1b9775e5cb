"""llama.cpp's importance matrices: for each weight the mean of the squares of its inputs, column by column.

Two forms. GGUF, ``general.type`` "imatrix": per weight ``<name>.in_sum2``, sums of squares, ``fp32 [experts, in]``, and
``<name>.counts``, of how many tokens, ``fp32 [experts, 1]``; ``imatrix.datasets``, ``imatrix.chunk_count`` and
``imatrix.chunk_size``. The older form, usually ``.dat``, is a plain list of names and means, times a number of calls.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.gguf.architectures import Architecture
from lowbit.wire.gguf.container import Gguf, open_gguf
from lowbit.wire.gguf.names import to_gguf, to_transformers
from lowbit.wire.gguf.types import GgmlType
from lowbit.wire.gguf.values import MAGIC
from lowbit.wire.gguf.writer import Entry, write_gguf

_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_OTHERS: Final = ".in_sum"  # sums of the inputs themselves, which newer files have and nothing here needs
_LONGEST_NAME: Final = 1 << 12
_SMALLEST_ENTRY: Final = 4 + 1 + 4 + 4 + 4
_INT: Final = struct.Struct("<i")


@dataclass(frozen=True)
class Importance:
    """Of one weight.

    Attributes:
        squares: means of ``x²``, ``fp32 [in]``; of stacked experts ``fp32 [experts, in]``. An expert that saw no token
            has ones.
        counts: how many tokens, ``fp32 [1]`` or ``[experts]``; of the older form, which doesn't say, the chunks.
    """

    squares: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a file holds.

    Attributes:
        entries: by GGUF's name of the weight, such as ``blk.0.attn_q.weight``.
        datasets: names of the texts that it was made from.
        chunks: how many pieces of them.
        chunk_size: tokens in each; 0 where the file doesn't say.
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = field(default=())
    chunks: int = 0
    chunk_size: int = 0

    def by_module(self, row: Architecture, experts: int = 1) -> dict[str, Importance]:
        """The same by Transformers' names of modules, such as ``model.layers.0.self_attn.q_proj``.

        Experts that are stacked in GGUF and apart in Transformers have one entry each. Entries that the architecture
        has no name for are left out.

        Args:
            row: of the table of architectures; see :func:`lowbit.wire.gguf.names.architecture_for`.
            experts: how many the model has; only the older form, which has them in one row, needs to be told.

        Raises:
            FormatError: a row doesn't divide into so many experts.
        """
        found: dict[str, Importance] = {}
        for name, entry in self.entries.items():
            ours = to_transformers(row, name)
            if ours is None:
                continue
            module = ours.removesuffix(".weight")
            if "{e}" not in module:
                found[module] = entry
                continue
            for expert, squares in enumerate(_apart(name, entry.squares, experts)):
                counts = entry.counts[expert : expert + 1] if len(entry.counts) > 1 else entry.counts
                found[module.replace("{e}", str(expert))] = Importance(squares, counts)
        return found

    @classmethod
    def of_modules(cls, row: Architecture, modules: Mapping[str, Importance], **facts: Any) -> ImportanceMatrix:
        """The inverse of :meth:`by_module`: experts are stacked.

        Args:
            facts: datasets, chunks, chunk_size.

        Raises:
            FormatError: a module that the architecture has no name for, or experts with gaps or of different widths.
        """
        entries: dict[str, Importance] = {}
        experts: dict[str, dict[int, Importance]] = {}
        for module, entry in modules.items():
            place = to_gguf(row, f"{module}.weight")
            if place is None:
                raise FormatError("GGUF has no name for this module", tensor=module, expected=f"one of '{row.name}'")
            name, expert = place
            if expert is None:
                entries[name] = entry
            else:
                experts.setdefault(name, {})[expert] = entry
        return cls(entries | {name: _stacked(name, parts) for name, parts in experts.items()}, **facts)


def _apart(name: str, squares: Tensor, experts: int) -> Tensor:
    """``[experts, in]``."""
    if squares.dim() == 2:
        return squares
    if experts < 1 or squares.numel() % experts:
        raise FormatError("doesn't divide into experts", tensor=name, found=squares.numel(), expected=f"n x {experts}")
    return squares.view(experts, -1)


def _stacked(name: str, parts: Mapping[int, Importance]) -> Importance:
    if sorted(parts) != list(range(len(parts))):
        raise FormatError("experts are missing", tensor=name, found=sorted(parts)[:8], expected=f"0..{max(parts)}")
    inside = [parts[number] for number in range(len(parts))]
    if len({part.squares.shape for part in inside}) != 1 or any(part.squares.dim() != 1 for part in inside):
        raise FormatError("experts differ in width", tensor=name, found=[list(p.squares.shape) for p in inside][:8])
    return Importance(torch.stack([p.squares for p in inside]), torch.cat([p.counts[:1] for p in inside]))


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix in either form.

    Raises:
        FormatError: the file is damaged, holds something else, or has numbers that are negative or not finite.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FormatError("there is no such file")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                file.seek(0)
                return _Legacy(file, path.stat().st_size).matrix
        return _from_gguf(open_gguf(path))
    except OSError as error:
        raise FormatError(f"can't be read: {error.strerror or error}", file=str(path)) from error
    except FormatError as error:
        raise error.located(file=str(path)) from error


def write_imatrix(path: str | Path, matrix: ImportanceMatrix) -> None:
    """Write an importance matrix in its GGUF form, entries in the order of their names as llama.cpp has them.

    Raises:
        FormatError: an entry has no counts, shapes that don't belong together, or numbers that no mean of squares has.
    """
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets) or [""],
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    tensors = []
    for name, entry in sorted(matrix.entries.items()):
        squares, counts = _checked(name, entry)
        shape = (len(counts), squares.shape[-1])
        sums = squares.view(shape) * counts.unsqueeze(1)
        tensors.append(Entry(name + _SUMS, shape, GgmlType.F32, lambda sums=sums: sums))  # type: ignore[misc]
        tensors.append(Entry(name + _COUNTS, (len(counts), 1), GgmlType.F32, lambda counts=counts: counts))  # type: ignore[misc]
    write_gguf(path, metadata, tensors)


def _checked(name: str, entry: Importance) -> tuple[Tensor, Tensor]:
    squares, counts = entry.squares.detach().cpu().float(), entry.counts.detach().cpu().float().view(-1)
    experts = 1 if squares.dim() == 1 else len(squares)
    if squares.dim() not in (1, 2) or squares.numel() == 0 or len(counts) not in (1, experts):
        raise FormatError(
            "an entry has other shapes", tensor=name, found=f"{list(squares.shape)} and {list(counts.shape)}",
            expected="[in] and [1], or [experts, in] and [experts]",
        )  # fmt: skip
    _require_means(name, squares)
    _require_means(name, counts)
    return squares.contiguous(), counts.expand(experts).contiguous()


def _require_means(name: str, numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
        raise FormatError("a mean of squares is negative or not finite", tensor=name, expected="finite numbers from 0")


def _from_gguf(file: Gguf) -> ImportanceMatrix:
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise FormatError("is not an importance matrix", tensor="general.type", found=kind, expected="imatrix")
    entries = {}
    for name in file.tensors:
        if name.endswith(_SUMS):
            stem = name.removesuffix(_SUMS)
            entries[stem] = _entry(stem, _floats(file, name), _floats(file, stem + _COUNTS))
        elif not name.endswith((_COUNTS, _OTHERS)):
            raise FormatError("a tensor that no importance matrix has", tensor=name, expected=f"*{_SUMS}, *{_COUNTS}")
        elif name.endswith(_COUNTS) and name.removesuffix(_COUNTS) + _SUMS not in file.tensors:
            raise FormatError("counts without sums", tensor=name, expected=name.removesuffix(_COUNTS) + _SUMS)
    if not entries:
        raise FormatError("the importance matrix is empty", found=len(file.tensors), expected=f"tensors named *{_SUMS}")
    datasets = file.metadata.get("imatrix.datasets", [])
    if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets):
        raise FormatError("not a list of names", tensor="imatrix.datasets", found=repr(datasets)[:80])
    chunks, size = (_whole(file, key) for key in ("imatrix.chunk_count", "imatrix.chunk_size"))
    return ImportanceMatrix(entries, tuple(datasets), chunks, size)


def _whole(file: Gguf, key: str) -> int:
    value = file.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise FormatError("not a count", tensor=key, found=repr(value)[:80], expected="a whole number")
    return value


def _floats(file: Gguf, name: str) -> Tensor:
    if name not in file.tensors:
        raise FormatError("a tensor is missing", tensor=name)
    info = file.tensors[name]
    if info.type is not GgmlType.F32 or len(info.shape) > 2 or 0 in info.shape:
        raise FormatError(
            "wrong type or shape of a tensor", tensor=name, found=f"{info.type.name} {list(info.shape)}",
            expected="F32 [experts, in]",
        )  # fmt: skip
    return file.dense(name).clone().view(-1, info.shape[-1])


def _entry(name: str, sums: Tensor, counts: Tensor) -> Importance:
    """Means from sums; llama.cpp takes ones for an expert that saw nothing."""
    counts = counts.reshape(-1)
    if len(counts) not in (1, len(sums)):
        raise FormatError(
            "sums and counts don't belong together", tensor=name, found=f"{list(sums.shape)} and {list(counts.shape)}",
            expected="[experts, in] and [experts, 1]",
        )  # fmt: skip
    _require_means(name, sums)
    _require_means(name, counts)
    divisor = counts.unsqueeze(1)
    squares = torch.where(divisor > 0, sums / divisor, 1.0)
    return Importance(squares[0] if len(squares) == 1 else squares, counts)


class _Legacy:
    """The older form: a count; per entry a name, a number of calls, and sums over these; then chunks and a dataset."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size
        count = self._count("number of entries", _SMALLEST_ENTRY)
        if count == 0:
            raise FormatError("the importance matrix is empty", found=0, expected="at least one entry")
        entries: dict[str, Importance] = {}
        for _ in range(count):
            name = self._text("name of an entry", _LONGEST_NAME)
            if not name or name in entries:
                raise FormatError("an entry stands twice" if name else "an entry without a name", tensor=name or None)
            entries[name] = self._means(name)
        chunks = 0
        datasets: tuple[str, ...] = ()
        if self._left:
            chunks = self._integer("number of chunks")
        if self._left:
            datasets = (self._text("name of the dataset", _LONGEST_NAME),)
        if self._left:
            raise FormatError("bytes follow the importance matrix", found=self._left, expected=0)
        if chunks < 0:
            raise FormatError("a negative number of chunks", found=chunks)
        self.matrix = ImportanceMatrix(entries, datasets, chunks)

    def _means(self, name: str) -> Importance:
        calls = self._integer("number of calls")
        length = self._count("number of values", 4)
        if length == 0 or calls < 0:
            raise FormatError("an entry without values or calls", tensor=name, found=f"{length} values, {calls} calls")
        stored = torch.frombuffer(bytearray(self._take(4 * length, "values of an entry")), dtype=torch.float32)
        _require_means(name, stored)
        return Importance(stored / calls if calls else stored, torch.tensor([float(calls)]))

    def _take(self, count: int, what: str) -> bytes:
        stored = self._file.read(count) if 0 <= count <= self._left else b""
        if len(stored) != count:
            raise FormatError(
                f"the file ends within the {what}; it is no importance matrix, or cut short",
                found=f"{self._left} bytes", expected=count,
            )  # fmt: skip
        self._left -= count
        return stored

    def _integer(self, what: str) -> int:
        value: int = _INT.unpack(self._take(_INT.size, what))[0]
        return value

    def _count(self, what: str, smallest: int) -> int:
        count = self._integer(what)
        if count < 0 or count * smallest > self._left:
            raise FormatError(
                f"the {what} is more than the file has room for; it is no importance matrix, or cut short",
                found=count, expected=f"0..{self._left // smallest}",
            )  # fmt: skip
        return count

    def _text(self, what: str, longest: int) -> str:
        length = self._integer(f"length of the {what}")
        if not 0 <= length <= longest:
            raise FormatError(f"the {what} is too long", found=length, expected=f"0..{longest}")
        stored = self._take(length, what)
        try:
            return stored.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"the {what} is not UTF-8", found=stored[:40]) from error
