"""What llama.cpp's own quantizers make of weights: ``FOLDER`` has ``weights.safetensors``, gets ``theirs.safetensors``.

The library is inside the extension module of the package `xllamacpp`, whose ggml functions are called directly.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
    "NVFP4": 40, "Q1_0": 41,
}  # fmt: skip


def main(folder: Path) -> None:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations is not None
    (binary,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    library = ctypes.CDLL(str(binary))
    library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    made = {}
    for name, weight in load_file(folder / "weights.safetensors").items():
        rows, columns = weight.shape
        for kind, number in TYPES.items():
            stored = torch.zeros(rows, library.ggml_row_size(number, columns), dtype=torch.uint8)
            source = weight.float().contiguous()
            library.ggml_quantize_chunk(number, source.data_ptr(), stored.data_ptr(), 0, rows, columns, None)
            made[f"{name}.{kind}"] = stored
    save_file(made, folder / "theirs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
