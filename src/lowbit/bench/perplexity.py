"""Perplexity, as this project defines it everywhere.

The text is tokenized without special tokens and cut into windows of `seq_len` that don't overlap; a last partial window
is dropped. Each window predicts its tokens 2 to n from what precedes them in the window. The result is
``exp(total negative log-likelihood / predicted tokens)``, with the log-likelihoods taken in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.calibration.data import max_positions
from lowbit.errors import PlanError

# Windows are evaluated together up to this many tokens. LLM.int8() picks its outlier columns per batch, so that its
# result depends on the batch: at the usual 1024 tokens a window stays alone.
_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        nll: total negative log-likelihood in nats.
        tokens: how many tokens were predicted.
    """

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.nll / self.tokens)


def token_windows(tokenizer: Any, text: str, seq_len: int) -> Tensor:
    """Cut a text into windows.

    Returns:
        ``int64 [windows, seq_len]``.

    Raises:
        PlanError: a window would predict nothing, or the text is shorter than one.
    """
    if seq_len < 2:
        raise PlanError(f"a window needs at least 2 tokens to predict one, not {seq_len}")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    count = ids.numel() // seq_len
    if count == 0:
        raise PlanError(f"the text has {ids.numel()} tokens, which is less than one window of {seq_len}")
    return ids[: count * seq_len].view(count, seq_len)


def check_seq_len(config: Any, seq_len: int) -> None:
    """Refuse windows that are longer than a model allows.

    Raises:
        PlanError: names both lengths.
    """
    limit = max_positions(config)
    if limit is not None and seq_len > limit:
        raise PlanError(f"windows of {seq_len} tokens are longer than the model's {limit} positions")


def perplexity(
    model: Any, windows: Tensor, *, batch_size: int | None = None, on_windows: Callable[[int], object] | None = None
) -> Perplexity:
    """Measure a causal language model.

    Args:
        model: a causal language model of Transformers, on any devices.
        windows: ``int64 [windows, seq_len]`` on any device, see :func:`token_windows`.
        batch_size: windows per forward pass; by default as many as make 1024 tokens, at least one.
        on_windows: called after each forward pass with the number of windows in it.

    Raises:
        PlanError: the windows are longer than the model allows, or its logits are not finite.
    """
    count, seq_len = windows.shape
    check_seq_len(model.config, seq_len)
    nll = 0.0
    for batch in torch.split(windows, batch_size or max(1, _BATCH_TOKENS // seq_len)):
        nll += _nll(model, batch.to(model.device))
        if on_windows is not None:
            on_windows(len(batch))
    if not math.isfinite(nll):
        raise PlanError(f"the model gives NaN or infinite logits in {model.dtype}; try another dtype")
    return Perplexity(nll, count * (seq_len - 1))


@torch.inference_mode()
def _nll(model: Any, batch: Tensor) -> float:
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    # One window at a time, so that only one window's logits exist in fp32.
    losses = [
        functional.cross_entropy(scores.float(), ids.to(scores.device), reduction="none")
        for scores, ids in zip(logits, batch[:, 1:], strict=True)
    ]
    return sum(float(loss.double().sum()) for loss in losses)
