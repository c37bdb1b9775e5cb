"""A GGUF file as a checkpoint with Transformers' names, rows in Transformers' order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.gguf.config import config_of, heads_of
from lowbit.wire.gguf.container import TensorInfo, open_gguf
from lowbit.wire.gguf.names import ROPE_TENSORS, Rows, find_architecture, to_transformers
from lowbit.wire.gguf.types import DTYPES, GgmlType
from lowbit.wire.gguf.wire import TYPES_KEY, types_text

# safetensors' names of dtypes.
_DTYPE_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor comes from: a tensor of the file, or one expert of it."""

    info: TensorInfo
    expert: int | None = None


class GgufCheckpointFiles:
    """The tensors of a GGUF file by Transformers' names: ``<module>.gguf`` for blocks, else ``<module>.weight``.

    Stacked experts are given one by one, as Transformers' own checkpoints hold them.

    Attributes:
        path: of the file.
        file: the open file.
        config: Transformers' configuration, as ``config.json`` would hold it.
        types: of every module that is stored in blocks.

    Raises:
        FormatError: the file is damaged, of an unknown architecture, or holds tensors that the table doesn't know.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = open_gguf(path)
        try:
            self._row = find_architecture(self.file.metadata, self.file.tensors)
            self.config: dict[str, Any] = config_of(self.file)
            self._rows = Rows(self._row, *heads_of(self.config))
            self._stored = dict(self._entries())
        except FormatError as error:
            raise error.located(file=str(self.path)) from error

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def types(self) -> dict[str, GgmlType]:
        return {
            name.removesuffix(".gguf"): stored.info.type
            for name, stored in self._stored.items()
            if not stored.info.type.dense
        }

    def names(self) -> list[str]:
        return list(self._stored)

    def layout(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype name."""
        info = self._stored[name].info
        if not info.type.dense:
            return (info.shape[-2], info.type.row_bytes(info.shape[-1])), "U8"
        return tuple(self._turned(name, self.view(name)).shape), _DTYPE_NAMES[DTYPES[info.type]]

    def metadata(self) -> dict[str, str]:
        """The types of the blocks, as :class:`GgufWire` keeps them in the header of a safetensors file."""
        return {TYPES_KEY: types_text(self.types)}

    def file_of(self, name: str) -> Path:
        return self.file.file_of(self._stored[name].info.name)

    def tensor(self, name: str) -> Tensor:
        """One tensor: ``uint8 [rows, bytes per row]`` for blocks, else as Transformers has it. Don't write to it."""
        view = self.view(name)
        return view.flatten(0, -2) if name.endswith(".gguf") else self._turned(name, view)

    def view(self, name: str) -> Tensor:
        """As :meth:`tensor`, but where blocks would have to be copied to bring their rows in order, a view with more
        than one leading axis, which together are the rows.
        """
        stored = self._stored[name]
        info = stored.info
        if info.type.dense:
            return self.file.dense(info.name)
        raw = self.file.raw(info.name)
        if stored.expert is not None:
            raw = raw.view(info.shape[0], -1, raw.shape[-1])[stored.expert]
        return self._rows.undo(info.name, raw)

    def loadable(self) -> dict[str, LazyTensor]:
        """All tensors by name, each read when it is asked for; what Transformers' loader takes as a state dict."""
        return {name: LazyTensor(self, name) for name in self._stored}

    def _entries(self) -> Iterator[tuple[str, _Stored]]:
        for info in self.file.tensors.values():
            if info.name in ROPE_TENSORS:
                continue
            name = to_transformers(self._row, info.name)
            if name is None:
                raise FormatError(
                    f"the table of '{self._row.name}' has no such tensor", tensor=info.name, found=info.type.name
                )
            if not info.type.dense:
                name = self._packed_name(name, info)
            if "{e}" not in name:
                yield name, _Stored(info)
                continue
            for expert in range(self._experts(info)):
                yield name.replace("{e}", str(expert)), _Stored(info, expert)

    def _packed_name(self, name: str, info: TensorInfo) -> str:
        if not name.endswith(".weight") or len(info.shape) < 2:
            raise FormatError("only matrices can be quantized", tensor=info.name, found=list(info.shape))
        return f"{name.removesuffix('.weight')}.gguf"

    def _experts(self, info: TensorInfo) -> int:
        declared = self.config.get("num_local_experts") or self.config.get("num_experts")
        if len(info.shape) != 3 or info.shape[0] != declared:
            raise FormatError(
                "not one weight for each expert", tensor=info.name, found=list(info.shape), expected=declared
            )
        return info.shape[0]

    def _turned(self, name: str, stored: Tensor) -> Tensor:
        """Numbers as Transformers has them: experts apart, rows in order, norms without their offset."""
        source = self._stored[name]
        if source.expert is not None:
            stored = stored[source.expert]
        tensor = self._rows.undo(source.info.name, stored)
        if tensor.dim() != stored.dim():
            tensor = tensor.flatten(0, 2)
        module = source.info.name.rpartition(".")[0].rpartition(".")[2]
        if self._row.norm_offset and "norm" in module:
            tensor = tensor - self._row.norm_offset
        if name.rpartition(".")[0].rpartition(".")[2] in self._row.transposed and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        if module in self._row.unsqueezed and tensor.dim() == 1:
            tensor = tensor.unsqueeze(0)
        return tensor


class LazyTensor:
    """A tensor that is read by ``[...]``, with what Transformers' loader asks before."""

    def __init__(self, files: GgufCheckpointFiles, name: str) -> None:
        self._files, self._name = files, name

    def __getitem__(self, index: Any) -> Tensor:
        packed = self._name.endswith(".gguf")
        tensor = self._files.view(self._name) if packed else self._files.tensor(self._name)
        return tensor[index]

    def get_dtype(self) -> str:
        return self._files.layout(self._name)[1]

    def get_shape(self) -> list[int]:
        return list(self._files.layout(self._name)[0])


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return Path(path).suffix.lower() == ".gguf"
