"""How much memory there is for the taking."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device; of the host's memory also what only caches files."""
    if device.type == "cuda":
        return _free_on_cuda(device)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_on_cuda(device: torch.device) -> int:
    """What the device has left, or torch where ``set_per_process_memory_fraction`` gave it less."""
    free, total = torch.cuda.mem_get_info(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    share = torch.cuda.get_per_process_memory_fraction(index)
    return max(0, min(int(free), int(share * total) - torch.cuda.memory_reserved(device)))
