"""What quantization costs on a real model and real text: the first windows of WikiText-2 here, the whole file by hand.

The whole file (327 windows) was measured once with ``lowbit eval --dtype float32``; docs/quality.md has the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.bench.perplexity import perplexity, token_windows
from lowbit.nn import QuantLinear

WINDOWS, SEQ_LEN = 3, 1024


@pytest.fixture(scope="module")
def windows(testbed: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(testbed / "base")
    text = (testbed / "wikitext2_test.txt").read_text(encoding="utf-8")
    return token_windows(tokenizer, text, SEQ_LEN)[:WINDOWS]


def load(testbed: Path, config: Any = None) -> Any:
    return lowbit.AutoModelForCausalLM.from_pretrained(
        testbed / "base", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


@pytest.fixture(scope="module")
def dense(testbed: Path, windows: torch.Tensor) -> float:
    return perplexity(load(testbed), windows).value


# How much more perplexity each method costs on these windows, in per cent: half a per cent around what was measured.
COSTS = {
    "rtn 4-bit g128 asymmetric": (lambda: lowbit.GPTQConfig(bits=4, sym=False), 4.7, 5.7),
    "rtn 4-bit g128 symmetric": (lambda: lowbit.GPTQConfig(bits=4, sym=True), 5.9, 6.9),
    "nf4": (lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 2.4, 3.4),
    "int8": (lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True), -0.4, 0.6),
}


@pytest.mark.parametrize("method", COSTS)
def test_the_cost_is_what_was_measured(method: str, testbed: Path, windows: torch.Tensor, dense: float) -> None:
    config, low, high = COSTS[method]
    model = load(testbed, config())
    cost = 100 * (perplexity(model, windows).value / dense - 1)
    assert low < cost < high
    packed = [module.quant_tensor() for module in model.modules() if isinstance(module, QuantLinear)]
    bits = 8 * sum(tensor.nbytes for tensor in packed) / sum(tensor.shape[0] * tensor.shape[1] for tensor in packed)
    assert bits <= (8.1 if method == "int8" else 4.6)
