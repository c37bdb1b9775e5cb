"""Loading a GGUF file takes the file's size, one layer and a constant; its blocks stay as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lowbit.wire.gguf.metadata import facts_of, metadata_of
from lowbit.wire.gguf.mixtures import mixture
from lowbit.wire.gguf.names import architecture_for, to_gguf
from lowbit.wire.gguf.writer import Entry, write_gguf
from test_memory import CONSTANT, PROBE


def random_file(path: Path, config: transformers.LlamaConfig) -> Path:
    """A Q4_K_M file with random blocks, whose scales are finite."""
    data = config.to_dict()
    row = architecture_for(data)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    chosen, facts = mixture("Q4_K_M"), facts_of(row, data)
    entries = []
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target, _ = to_gguf(row, name) or ("", None)
        shape = tuple(tensor.shape)
        kind = chosen(target, shape, facts)
        size = kind.row_bytes(shape[-1]) * (shape[0] if len(shape) == 2 else 1)
        entries.append(Entry(target, shape, kind, lambda size=size: torch.randint(0, 60, (size,), dtype=torch.uint8)))
    metadata = {"general.architecture": row.name, **metadata_of(row, data)[0], "tokenizer.ggml.model": "no_vocab"}
    write_gguf(path, metadata, entries)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 8, "intermediate_size": 3072, "hidden_size": 768, "tie_word_embeddings": True}
    large = transformers.LlamaConfig(num_hidden_layers=12, vocab_size=16384, **sizes)
    tiny = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=512, **sizes)
    file = random_file(tmp_path / "large.gguf", large)
    command = [sys.executable, "-c", PROBE, str(random_file(tmp_path / "tiny.gguf", tiny)), str(file)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    layer = 4 * 768 * 3072  # its largest matrix, were it dense
    assert measured["footprint"] < 1.01 * file.stat().st_size
    assert measured["peak"] < file.stat().st_size + layer + CONSTANT
    assert measured["generating"] < layer + CONSTANT
