"""Perplexity against its definition, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.bench import bits_per_weight, perplexity, token_windows
from lowbit.errors import PlanError

SEQ_LEN = 32


@pytest.fixture(scope="module")
def model(small: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(small)


@pytest.fixture(scope="module")
def content(text: Path) -> str:
    return text.read_text(encoding="utf-8")


def test_is_what_the_definition_says(model: Any, tokenizer: Any, content: str) -> None:
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN):
        window = torch.tensor([ids[start : start + SEQ_LEN]])
        with torch.no_grad():
            log_p = model(window).logits[0].double().log_softmax(-1)
        for position in range(1, SEQ_LEN):
            total -= float(log_p[position - 1, window[0, position]])
            count += 1
    measured = perplexity(model, token_windows(tokenizer, content, SEQ_LEN))
    assert measured.tokens == count
    assert measured.value == pytest.approx(math.exp(total / count), rel=1e-6)


def test_the_embedded_text_has_the_perplexity_that_is_noted_beside_it(model: Any, tokenizer: Any, small: Path) -> None:
    facts = json.loads((small.parent / "sample.json").read_text(encoding="utf-8"))
    whole = (small.parent / "sample.txt").read_bytes().decode("utf-8")
    windows = token_windows(tokenizer, whole, facts["seq_len"])
    assert windows.numel() == facts["tokens"]
    assert perplexity(model, windows, batch_size=8).value == pytest.approx(facts["perplexity"], abs=2e-4)


def test_windows_leave_no_gap_and_drop_the_rest(tokenizer: Any, content: str) -> None:
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    windows = token_windows(tokenizer, content, SEQ_LEN)
    assert windows.shape == (len(ids) // SEQ_LEN, SEQ_LEN)
    assert windows.flatten().tolist() == ids[: windows.numel()]


def test_no_special_tokens(tokenizer: Any, content: str) -> None:
    assert not set(tokenizer.all_special_ids) & set(token_windows(tokenizer, content, SEQ_LEN).flatten().tolist())


def test_the_batch_does_not_matter(model: Any, tokenizer: Any, content: str) -> None:
    windows = token_windows(tokenizer, content, SEQ_LEN)
    seen: list[int] = []
    alone = perplexity(model, windows, batch_size=1, on_windows=seen.append)
    assert perplexity(model, windows, batch_size=5).value == pytest.approx(alone.value, rel=1e-5)
    assert seen == [1] * len(windows)


def test_half_precision_is_summed_in_fp32(small: Path, tokenizer: Any, content: str, model: Any) -> None:
    half = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    windows = token_windows(tokenizer, content, SEQ_LEN)
    assert perplexity(half, windows).value == pytest.approx(perplexity(model, windows).value, rel=3e-3)


def test_refuses_a_text_shorter_than_a_window(tokenizer: Any) -> None:
    with pytest.raises(PlanError, match=r"the text has \d+ tokens, which is less than one window of 1024"):
        token_windows(tokenizer, "A few words.", 1024)
    with pytest.raises(PlanError, match="0 tokens"):
        token_windows(tokenizer, "", 16)


def test_refuses_windows_that_predict_nothing(tokenizer: Any) -> None:
    with pytest.raises(PlanError, match="at least 2 tokens"):
        token_windows(tokenizer, "A few words.", 1)


def test_refuses_windows_longer_than_the_model(model: Any) -> None:
    with pytest.raises(PlanError, match=r"2048 tokens are longer than the model's 1024 positions"):
        perplexity(model, torch.zeros(1, 2048, dtype=torch.int64))


def test_refuses_logits_that_are_not_finite(small: Path) -> None:
    broken = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(PlanError, match="NaN or infinite logits"):
        perplexity(broken, torch.zeros(1, 8, dtype=torch.int64))


def test_bits_of_dense_weights_are_those_of_their_dtype(model: Any, small: Path) -> None:
    assert bits_per_weight(model) == 32
    assert bits_per_weight(transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)) == 16
    assert bits_per_weight(torch.nn.ReLU()) == 0
