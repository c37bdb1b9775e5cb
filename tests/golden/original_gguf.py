"""What the `gguf` package makes of the same bytes and of the same weights.

``run FOLDER``: reads ``ours.gguf`` and writes every tensor, dequantized, to ``theirs.safetensors`` and the metadata to
``metadata.json``; quantizes ``weights.safetensors`` to every type that it can and writes ``theirs.gguf``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import quants
from safetensors.torch import load_file, save_file

MADE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "F16", "BF16", "F32")


def read(folder: Path) -> None:
    reader = gguf.GGUFReader(folder / "ours.gguf")
    dense: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        if tensor.tensor_type.name in ("Q1_0", "I8", "I16", "I32", "I64", "F64"):
            continue
        rows = tensor.data.reshape(-1, tensor.data.shape[-1]).view(np.uint8)
        values = quants.dequantize(rows, tensor.tensor_type)
        dense[tensor.name] = torch.from_numpy(values.reshape([int(n) for n in reversed(tensor.shape)]))
    save_file(dense, folder / "theirs.safetensors")
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = {key: [field.contents(), [kind.name for kind in field.types]] for key, field in fields.items()}
    (folder / "metadata.json").write_text(json.dumps(values, default=float), encoding="utf-8")


def write(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "theirs.gguf", "llama")
    add(writer)
    for name, weight in load_file(folder / "weights.safetensors").items():
        for kind in MADE:
            quantized = quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(f"{name}.{kind}", quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: Any) -> None:
    """A value of every type."""
    writer.add_uint8("a.uint8", 255)
    writer.add_int8("a.int8", -128)
    writer.add_uint16("a.uint16", 65535)
    writer.add_int16("a.int16", -2)
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int32("a.int32", -3)
    writer.add_uint64("a.uint64", 2**64 - 1)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Ġthe ▁")
    writer.add_array("a.strings", ["", "é", "<s>"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -0.25])


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        read(Path(sys.argv[2]))
        write(Path(sys.argv[2]))
