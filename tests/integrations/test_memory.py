"""Loading a quantized checkpoint takes its size, one layer and a constant, and generating no more than the latter two.

Measured in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import lowbit

MIB = 2**20
LAYER = 2 * 768 * 3072 * 3  # the largest decoder block's linears in fp16, were it dense
CONSTANT = 64 * MIB

PROBE = """
import gc, json, sys, threading
import lowbit, torch, transformers

transformers.logging.disable_progress_bar()

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def growth(work):
    # What work() returns, and the most anonymous memory that it took beyond what there was.
    gc.collect()
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return result, max(peak, anonymous()) - before

def generate(model):
    return model.generate(torch.arange(3, 19)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)

load = lowbit.AutoModelForCausalLM.from_pretrained
generate(load(sys.argv[1]))  # imports, thread pools and the like
model, peak = growth(lambda: load(sys.argv[2]))
footprint = model.get_memory_footprint()
_, generating = growth(lambda: generate(model))
assert model.get_memory_footprint() == footprint
print(json.dumps({"peak": peak, "generating": generating, "footprint": footprint}))
"""

CONFIGS = {
    "nf4": lambda: lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: lowbit.GPTQConfig(bits=4),
    "awq": lowbit.AwqConfig,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90M random parameters in 12 blocks: large enough for the peak to stand out."""
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8, vocab_size=1024
    )
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("method", CONFIGS)
def test_peak_memory_of_loading(method: str, dense: Path, small: Path, tmp_path: Path) -> None:
    load = lowbit.AutoModelForCausalLM.from_pretrained
    load(dense, quantization_config=CONFIGS[method]()).save_pretrained(tmp_path / "large")
    load(small, quantization_config=CONFIGS[method]()).save_pretrained(tmp_path / "small")
    command = [sys.executable, "-c", PROBE, str(tmp_path / "small"), str(tmp_path / "large")]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert measured["peak"] < size + LAYER + CONSTANT
    assert measured["generating"] < LAYER + CONSTANT
    dense_size = (dense / "model.safetensors").stat().st_size
    if method != "int8":
        assert size + LAYER + CONSTANT < dense_size, "the bound would not catch a model that was expanded"
