"""Write src/lowbit/core/ggml_grids.bin: the vectors of ggml's lattice types, packed, from the `gguf` package.

Usage: python tools/make_ggml_grids.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gguf import quants

from lowbit.core.blocks import GRIDS, pack_grid

TARGET = Path(__file__).parents[1] / "src" / "lowbit" / "core" / "ggml_grids.bin"


def main() -> None:
    packed = []
    for name, grid in GRIDS.items():
        original = getattr(quants, name.upper())
        original.init_grid()
        values = torch.from_numpy(original.grid.copy()).reshape(grid.vectors, grid.size)
        packed.append(pack_grid(grid, values))
    data = b"".join(packed)
    if "--check" in sys.argv:
        assert TARGET.read_bytes() == data
    else:
        TARGET.write_bytes(data)


if __name__ == "__main__":
    main()
