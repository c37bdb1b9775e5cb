"""GGUF models against the gguf package and stock Transformers, which reads what it can of them densely.

Stock Transformers 5.23 can't read, or reads wrongly, models with heads of another size than hidden / heads (Qwen3),
Falcon-40B's order of rows, Mistral by name, Mixtral, stacked experts of another width than its defaults, scaled rotary
positions; those are compared with the dense originals in ``tests/integrations/test_gguf_auto.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import apart
import lowbit
from lowbit.integrations.transformers.gguf.export import write_gguf_model

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
import gguf_models

apart.require("gguf")

WRITTEN = ("llama", "qwen2", "phi3", "gemma2", "gemma3", "falcon", "stablelm")
TESTBED = ("small-Q4_K_M", "small-Q8_0")
TEXTS = ["The history of the town of", " don't  stop\n\nnow, 12345!", "Ünïcödé 東京 🦙"]


@pytest.fixture(scope="module")
def folder(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files by llama.cpp and by lowbit, with what the originals make of them beside each."""
    made = tmp_path_factory.mktemp("gguf")
    (made / "texts.json").write_text(json.dumps(TEXTS))
    for name in TESTBED:
        (made / f"{name}.gguf").symlink_to(testbed / "gguf" / f"{name}.gguf")
    for kind in WRITTEN:
        gguf_models.save(kind, made / kind)
        write_gguf_model(made / kind, made / f"{kind}.gguf", "Q8_0")
    write_gguf_model(testbed / "small", made / "written-Q4_K_M.gguf", "Q4_K_M")
    apart.run("original_gguf_models.py", made)
    return made


@pytest.mark.parametrize("name", [*TESTBED, "written-Q4_K_M", *WRITTEN])
def test_weights_equal_stock_transformers(name: str, folder: Path) -> None:
    stock = load_file(folder / f"{name}.stock.safetensors")
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        folder / f"{name}.gguf", quantization_config=lowbit.GgufConfig(dequantize=True)
    )
    ours = model.state_dict()
    assert ours.keys() == stock.keys()
    assert {name for name, tensor in stock.items() if not torch.equal(ours[name], tensor)} == set()


@pytest.mark.parametrize("name", [*TESTBED, "written-Q4_K_M"])
def test_weights_equal_the_gguf_package(name: str, folder: Path) -> None:
    """Rows of queries and keys are interleaved halves in the file."""
    blocks = load_file(folder / f"{name}.blocks.safetensors")
    checkpoint = lowbit.open_checkpoint(folder / f"{name}.gguf")
    assert len(checkpoint.weights) + len(checkpoint.dense) == len(blocks)
    for layer in range(4):
        for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
            stored = blocks[f"blk.{layer}.{theirs}.weight"]
            expected = stored.view(heads, 32, 2, -1).transpose(1, 2).reshape(stored.shape)
            read = checkpoint.weights[f"model.layers.{layer}.self_attn.{ours}"].dequantize()
            assert torch.equal(read, expected)
        for ours, theirs in (("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
            read = checkpoint.weights[f"model.layers.{layer}.{ours}"].dequantize()
            assert torch.equal(read, blocks[f"blk.{layer}.{theirs}.weight"])
    assert torch.equal(checkpoint.weights["model.embed_tokens"].dequantize(), blocks["token_embd.weight"])
    assert torch.equal(checkpoint.files.tensor("model.norm.weight"), blocks["output_norm.weight"])


def test_tokens_equal_stock_transformers(folder: Path) -> None:
    for name in (*TESTBED, "written-Q4_K_M"):
        expected = json.loads((folder / f"{name}.ids.json").read_text())
        tokenizer = lowbit.AutoTokenizer.from_pretrained(folder / f"{name}.gguf")
        assert [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS] == [
            ids[1:] if ids[:1] == [0] else ids for ids in expected
        ]


def test_llama_cpp_chose_the_same_types_and_wrote_the_same_bytes(folder: Path) -> None:
    """All of Q8_0; of the mixture the types, and at least all plain tensors (its quantizer used other code paths)."""
    from lowbit.wire.gguf.container import open_gguf

    theirs, ours = open_gguf(folder / "small-Q4_K_M.gguf"), open_gguf(folder / "written-Q4_K_M.gguf")
    assert {name: info.type for name, info in theirs.tensors.items()} == {
        name: info.type for name, info in ours.tensors.items()
    }
    different = {name for name in theirs.tensors if not torch.equal(theirs.raw(name), ours.raw(name))}
    assert different == set()
