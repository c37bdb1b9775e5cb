"""Blocks whose weights are brought from the disk for as long as they are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Final

import torch
from torch import Tensor, nn

_READ_AHEAD: Final = 1 << 30


class ReadAhead(Mapping[str, Tensor]):
    """Weights of which some can be read in a thread before they are asked for.

    Args:
        weights: by name, read when asked for.
        limit: bytes that are read ahead at most.
    """

    def __init__(self, weights: Mapping[str, Tensor], limit: int = _READ_AHEAD) -> None:
        self._weights, self._limit = weights, limit
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1)
        self._reading: Future[dict[str, Tensor]] | None = None
        self._wanted: set[str] = set()

    def start(self, names: list[str]) -> None:
        """Read weights, each of which is then given out once; what was read ahead before is forgotten."""
        if self._reading is not None:
            self._reading.exception()
        self._wanted = set(names)
        self._reading = self._thread.submit(self._read, names)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}
        left = self._limit
        for name in names:
            with self._lock:
                value = self._weights[name]
            left -= value.numel() * value.element_size()
            if left < 0:
                break
            read[name] = value.clone()  # a mapped file is read only now
        return read

    def __getitem__(self, name: str) -> Tensor:
        if self._reading is not None and name in self._wanted:
            self._wanted.discard(name)
            # What could not be read is read again, so that whoever asks is told why.
            found = None if self._reading.exception() else self._reading.result().pop(name, None)
            if found is not None:
                return found
        with self._lock:
            return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def missing_names(module: nn.Module, prefix: str) -> list[str]:
    """The full names of a module's parameters and buffers on the meta device."""
    owned = [*module.named_parameters(), *module.named_buffers()]
    return [f"{prefix}.{name}" for name, value in owned if value.is_meta]


def load_block(
    module: nn.Module,
    prefix: str,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Put weights in the places of a module's parameters and buffers that are on the meta device.

    Args:
        module: named `prefix` in its model.
        weights: by full name; read when asked for.
        device: where the module goes as a whole.
        dtype: what floating-point numbers are cast to; None for what they are.
    """
    for name, child in module.named_modules():
        path = f"{prefix}.{name}" if name else prefix
        for own, parameter in child._parameters.items():
            if parameter is not None:
                value = weights[f"{path}.{own}"] if parameter.is_meta else parameter.data
                child._parameters[own] = nn.Parameter(_placed(value, device, dtype), requires_grad=False)
        for own, buffer in child._buffers.items():
            if buffer is not None:
                value = weights[f"{path}.{own}"] if buffer.is_meta else buffer
                child._buffers[own] = _placed(value, device, None)


def unload_block(module: nn.Module) -> None:
    """Give the memory of a module's parameters back; buffers, which are small, go to the CPU."""
    for child in module.modules():
        for own, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[own] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        for own, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[own] = buffer.to("cpu")


@contextmanager
def loaded(
    module: nn.Module,
    prefix: str,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Iterator[nn.Module]:
    """:func:`load_block` for as long as the context lasts."""
    load_block(module, prefix, weights, device, dtype)
    try:
        yield module
    finally:
        unload_block(module)


def _placed(value: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    moved = value.to(device=device, dtype=wanted)
    # What comes from a mapped file must not be written through.
    return moved.clone() if moved.data_ptr() == value.data_ptr() else moved
