"""What llama.cpp's own quantizers make of weights: ``FOLDER`` has ``weights.safetensors``, gets ``theirs.safetensors``.

Where it also has ``importance.safetensors`` (by the same names, ``fp32 [in]``), every type that looks at importance is
made with it as ``<name>.<type>.weighted``, and those of IQ1, IQ2 and IQ3 that can do without also as ``<name>.<type>``.
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
GRIDS = {"IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ3_S": 21, "IQ2_S": 22, "IQ1_M": 29}
UNWEIGHTED = ("Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0")


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
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    weights = load_file(folder / "weights.safetensors")
    weighted = (folder / "importance.safetensors").exists()
    importance = load_file(folder / "importance.safetensors") if weighted else {}
    kinds = {**{name: n for name, n in TYPES.items() if name not in UNWEIGHTED}, **GRIDS} if weighted else TYPES
    made = {}
    for kind, number in kinds.items():
        library.ggml_quantize_init(number)
        for name, weight in weights.items():
            if weighted:
                made[f"{name}.{kind}.weighted"] = quantized(library, number, weight, importance[name])
            if not weighted or (kind in GRIDS and not library.ggml_quantize_requires_imatrix(number)):
                made[f"{name}.{kind}"] = quantized(library, number, weight, None)
    save_file(made, folder / "theirs.safetensors")


def quantized(library: ctypes.CDLL, number: int, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    rows, columns = weight.shape
    stored = torch.zeros(rows, library.ggml_row_size(number, columns), dtype=torch.uint8)
    source = weight.float().contiguous()
    by = None if importance is None else importance.data_ptr()
    library.ggml_quantize_chunk(number, source.data_ptr(), stored.data_ptr(), 0, rows, columns, by)
    return stored


if __name__ == "__main__":
    main(Path(sys.argv[1]))
