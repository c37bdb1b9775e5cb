"""Which row of the table a file belongs to, its tensors' names in Transformers' terms, and the order of their rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.gguf.architectures import ARCHITECTURES, Architecture

_BLOCK: Final = re.compile(r"\bblk\.(\d+)\.")
# Tensors that say how positions are rotated; they end up in the configuration.
ROPE_TENSORS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def find_architecture(metadata: Mapping[str, Any], tensors: Collection[str]) -> Architecture:
    """The row of the table that a file belongs to.

    Raises:
        FormatError: no architecture is named, or one that the table doesn't have.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FormatError("the file doesn't name its architecture", found=repr(name)[:80], expected="a string")
    title = str(metadata.get("general.name", "")).lower()
    for row in ARCHITECTURES:
        if row.name != name or (row.marker and row.marker not in tensors):
            continue
        if row.name_says is None or row.name_says in title:
            return row
    known = sorted({row.name for row in ARCHITECTURES})
    raise FormatError("an architecture that lowbit has no table for", found=name, expected=known)


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The row of the table for a Transformers configuration.

    Raises:
        FormatError: there is none; names those that there are.
    """
    rows = [row for row in ARCHITECTURES if row.model_type == config.get("model_type")]
    for row in rows:
        key = "new_decoder_architecture"
        if key not in row.constants or row.constants[key] == config.get(key):
            return row
    known = sorted({row.model_type for row in ARCHITECTURES})
    raise FormatError("GGUF files of this model are not supported", found=config.get("model_type"), expected=known)


def to_transformers(row: Architecture, name: str) -> str | None:
    """Transformers' name of a GGUF tensor; of stacked experts with ``{e}`` in it. None for what the table lacks."""
    module, _, part = name.rpartition(".")
    match = _BLOCK.match(module)
    number = match.group(1) if match else ""
    pattern = row.modules.get(module.replace(f"blk.{number}.", "blk.{n}.", 1) if match else module)
    return None if pattern is None else f"{pattern.replace('{n}', number)}.{part}"


def to_gguf(row: Architecture, name: str) -> tuple[str, int | None] | None:
    """GGUF's name of a Transformers tensor, and which expert it is of; None for what the table lacks."""
    module, _, part = name.rpartition(".")
    for pattern, ours in row.modules.items():
        match = _matcher(ours).fullmatch(module)
        if match:
            found = match.groupdict()
            expert = found.get("e")
            return f"{pattern.replace('{n}', found.get('n', ''))}.{part}", None if expert is None else int(expert)
    return None


def _matcher(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{e\}", r"(?P<e>\d+)"))


def blocks_of(tensors: Collection[str]) -> set[int]:
    """The numbers of the blocks that have tensors."""
    return {int(match.group(1)) for name in tensors if (match := _BLOCK.match(name))}


class Rows:
    """The order in which llama.cpp stores the rows of some weights.

    Args:
        heads, kv_heads: of the model.
    """

    def __init__(self, row: Architecture, heads: int, kv_heads: int) -> None:
        self._orders, self._heads, self._kv_heads = row.rows, heads, kv_heads

    def order(self, name: str) -> str | None:
        """How the rows of a GGUF tensor are ordered; None where they are as in Transformers."""
        return self._orders.get(name.rpartition(".")[0].rpartition(".")[2])

    def undo(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor ``[rows, ...]`` with its rows in Transformers' order.

        Where that is possible a view with more than one leading axis, so that nothing is read yet: flatten it.
        """
        kind = self.order(name)
        if kind is None or self._identity(kind):
            return tensor
        if kind == "grouped":
            return tensor.index_select(0, self._grouped(tensor.shape[0]).argsort())
        heads = self._heads if kind == "rope_q" else self._kv_heads
        self._check(tensor.shape[0], 2 * heads)
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`undo`, flattened."""
        kind = self.order(name)
        if kind is None or self._identity(kind):
            return tensor
        if kind == "grouped":
            return tensor.index_select(0, self._grouped(tensor.shape[0]))
        heads = self._heads if kind == "rope_q" else self._kv_heads
        self._check(tensor.shape[0], 2 * heads)
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def _identity(self, kind: str) -> bool:
        return kind == "grouped" and self._kv_heads == 1

    def _grouped(self, rows: int) -> Tensor:
        """Which of Transformers' rows each stored row is."""
        per_group = self._heads // self._kv_heads + 2
        self._check(rows, self._kv_heads * per_group)
        numbers = torch.arange(rows, device="cpu").view(self._kv_heads, per_group, -1)
        return torch.cat([numbers[:, :-2].reshape(-1), numbers[:, -2].reshape(-1), numbers[:, -1].reshape(-1)])

    def _check(self, rows: int, divisor: int) -> None:
        if rows == 0 or rows % divisor:
            raise FormatError("the rows don't divide into the model's heads", found=rows, expected=f"n x {divisor}")
