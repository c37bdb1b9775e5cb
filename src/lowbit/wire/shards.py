"""Writing a checkpoint's tensors one after the other, in files of bounded size and with bounded memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.store import INDEX, SINGLE

SHARD_BYTES = 2 * 10**9


class ShardWriter:
    """Collects tensors and writes a file whenever `shard_bytes` are full; :meth:`close` names the files and the index.

    Args:
        folder: exists, and is nobody else's meanwhile.
        metadata: what every file's header says beside its tensors.
        shard_bytes: of tensors in a file; one that is larger by itself gets a file of its own.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
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

    def _flush(self) -> None:
        if not self._waiting and self._names:
            return
        path = self._part(len(self._names))
        try:
            save_file(_apart(self._waiting), path, metadata=self._metadata)
        except SafetensorError as error:
            raise OSError(f"{path.name} can't be written: {error}") from error
        self._names.append(list(self._waiting))
        self._waiting, self._size = {}, 0


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The serializer takes no two tensors that share memory."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen and place else tensor
        seen.add(place)
    return apart
