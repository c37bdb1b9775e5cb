"""The activations between two blocks: on the device, in the host's memory, or in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.calibration.memory import free_memory

Place = Literal["device", "host", "disk"]
HOST_LIMIT: Final = 3 << 30


class Activations:
    """The hidden states of every batch, ``[batch, tokens, features]`` each; one is held at a time where they are files.

    Args:
        place: where they are kept.
        device: where they are needed.
        folder: for files; exists, and is nobody else's.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path | None = None) -> None:
        self.place: Place = place
        self.device, self._folder = device, folder
        self._held: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep the hidden states of a batch; takes the place of earlier ones.

        Raises:
            OSError: the disk is full, or can't be written.
        """
        if self.place == "disk" and self._folder is not None:
            path = self._folder / f"{batch:06d}.safetensors"
            try:
                save_file({"hidden": hidden.detach().to("cpu").contiguous()}, path)
            except SafetensorError as error:
                raise OSError(f"{path} can't be written: {error}") from error
            self._files[batch] = path
        else:
            self._held[batch] = (
                self._on_host(batch, hidden) if self.place == "host" else hidden.detach().to(self.device)
            )

    def get(self, batch: int) -> Tensor:
        """The hidden states of a batch, on the device."""
        if batch in self._files:
            return load_file(self._files[batch])["hidden"].to(self.device)
        return self._held[batch].to(self.device, non_blocking=self.place == "host" and self.device.type == "cuda")

    def _on_host(self, batch: int, hidden: Tensor) -> Tensor:
        """A GPU's copies go to pinned memory and aren't waited for: they come back in the order of the same stream."""
        if not hidden.is_cuda:
            return hidden.detach().to("cpu")
        kept = self._held.get(batch)
        if kept is None or kept.shape != hidden.shape or kept.dtype != hidden.dtype:
            kept = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return kept.copy_(hidden.detach(), non_blocking=True)

    def drop(self, batch: int) -> None:
        """Forget a batch."""
        self._held.pop(batch, None)
        path = self._files.pop(batch, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the batches, in order."""
        return iter(sorted({*self._held, *self._files}))

    def __len__(self) -> int:
        return len(self._held) + len(self._files)


def choose_place(nbytes: int, device: torch.device, host_limit: int = HOST_LIMIT) -> Place:
    """Where so many bytes go: to the device if it has four times as much free, else to the host, else to files.

    Args:
        nbytes: of all activations that are kept at once.
        device: where the work is done.
        host_limit: bytes of the host's memory that activations may take, if they are no more than a quarter of it.
    """
    if device.type == "cuda" and 4 * nbytes <= free_memory(device):
        return "device"
    return "host" if nbytes <= min(host_limit, free_memory(torch.device("cpu")) // 4) else "disk"
