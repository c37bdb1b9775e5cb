"""Generating token by token, and how fast it goes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generated:
    """A greedy continuation.

    Attributes:
        text: the new tokens, decoded.
        tokens_per_second: of decoding alone, without the prompt's pass; from the median time between tokens.
    """

    text: str
    tokens_per_second: float


class _Clock(BaseStreamer):
    """Notes when `generate` hands out each token; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


def generate(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> Generated:
    """Continue `prompt` greedily by exactly `new_tokens` tokens, at least 2; batch 1."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    clock = _Clock()
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=clock
        )
    decoding = clock.times[1:]
    steps = [after - before for before, after in pairwise(decoding)]
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Generated(text, 1 / statistics.median(steps))
