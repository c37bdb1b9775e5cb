"""Load GGUF files with stock Transformers, which needs the gguf package, and take their tensors apart with it.

``original_gguf_models.py FOLDER``: for every ``x.gguf`` in it leaves ``x.stock.safetensors``, the weights of the
model that stock Transformers makes of it (dense, fp32); ``x.blocks.safetensors``, what the gguf package makes of each
tensor; and where there is a tokenizer ``x.ids.json``, its tokens of ``texts.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
texts = json.loads((folder / "texts.json").read_text())
for file in sorted(folder.glob("*.gguf")):
    reader = GGUFReader(str(file))
    blocks = {tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    save_file(blocks, file.with_suffix(".blocks.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, file.with_suffix(".stock.safetensors")
    )
    if "tokenizer.ggml.tokens" in reader.fields:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        file.with_suffix(".ids.json").write_text(json.dumps([tokenizer(text).input_ids for text in texts]))
