"""Writing a checkpoint's tensors one after the other, in files of bounded size and with bounded memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.store import INDEX, SINGLE

SHARD_BYTES: Final = 2 * 10**9
HELD_BYTES: Final = 256 * 2**20  # of a shard's tensors that wait in memory; more of them wait in a file


class ShardWriter:
    """Collects tensors and writes a file whenever `shard_bytes` are full; :meth:`close` names the files and the index.

    Args:
        folder: exists, and is nobody else's meanwhile.
        metadata: what every file's header says beside its tensors.
        shard_bytes: of tensors in a file; one that is larger by itself gets a file of its own.
        held_bytes: of tensors that are kept as they are until their file is written; more of them wait in a file.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self._folder, self._limit, self._most_held = folder, shard_bytes, held_bytes
        self._held: list[str] = []
        self._held_bytes = 0
        self._spilled: list[Path] = []
        self._metadata = {"format": "pt", **metadata}
        self._waiting: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._names: list[list[str]] = []
        self._seen: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor.

        Raises:
            FormatError: there was one of this name.
            OSError: the disk is full, or can't be written.
        """
        if name in self._seen:
            raise FormatError("two tensors have the same name", tensor=name)
        self._seen.add(name)
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._size + size > self._limit:
            self._flush()
        self._waiting[name] = tensor.detach().contiguous()
        self._size += size
        self._total += size
        self._held.append(name)
        self._held_bytes += size
        if self._held_bytes > self._most_held:
            self._spill()

    def close(self) -> list[Path]:
        """Write what is left; returns the files."""
        self._flush()
        count = len(self._names)
        if count == 1:
            return [self._part(0).rename(self._folder / SINGLE)]
        files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        paths = [self._part(number).rename(self._folder / file) for number, file in enumerate(files)]
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: file for file, names in zip(files, self._names, strict=True) for name in names},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return paths

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"

    def _spill(self) -> None:
        """Let what waits in memory wait in a file instead; a shard's header, which comes first, needs all of them."""
        path = self._folder / f"waiting-{len(self._spilled):05d}.safetensors"
        _save({name: self._waiting[name] for name in self._held}, path, None)
        self._spilled.append(path)
        with safe_open(str(path), framework="pt") as file:
            self._waiting |= {name: file.get_tensor(name) for name in self._held}
        self._held, self._held_bytes = [], 0

    def _flush(self) -> None:
        if not self._waiting and self._names:
            return
        _save(self._waiting, self._part(len(self._names)), self._metadata)
        self._names.append(list(self._waiting))
        self._waiting, self._size, self._held, self._held_bytes = {}, 0, [], 0
        for path in self._spilled:
            path.unlink()
        self._spilled.clear()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    try:
        save_file(_apart(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name} can't be written: {error}") from error
    if metadata is not None and len(metadata) > 1:
        _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Put the header's metadata in order, which the serializer has in another one every time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The serializer takes no two tensors that share memory."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen and place else tensor
        seen.add(place)
    return apart
