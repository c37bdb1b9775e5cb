"""How far a model's predictions are from a reference's.

The Kullback-Leibler divergence of the model from the reference, KL(reference || model), in nats per token, over every
position of the windows; how often both find the same token most likely; and the perplexity of both over the predicted
tokens, as :mod:`lowbit.bench.perplexity` defines it. Log-probabilities are taken in fp32 and summed up in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.bench.perplexity import Perplexity, check_seq_len
from lowbit.errors import PlanError

_STRIP: Final = 128  # positions whose logits are in fp32 at the same time


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        positions: how many predictions were compared.
        divergence: mean KL(reference || model) in nats per token.
        standard_error: of that mean, from the spread between windows, because neighbours in a text are no independent
            samples; None for a single window.
        percentile_99: what 99 of 100 positions stay under.
        agreement: share of positions at which both find the same token most likely.
        model: perplexity of the model.
        reference: perplexity of the reference.
    """

    positions: int
    divergence: float
    standard_error: float | None
    percentile_99: float
    agreement: float
    model: Perplexity
    reference: Perplexity

    @property
    def ratio(self) -> float:
        """The model's perplexity over the reference's."""
        return math.exp((self.model.nll - self.reference.nll) / self.model.tokens)


@dataclass(frozen=True)
class _Window:
    """One window: the divergence of each position, matches, and what both models lose on its tokens."""

    divergences: Tensor  # fp64 [seq_len], on the CPU
    matches: int
    nll: float
    reference_nll: float


def check_vocabularies(config: Any, reference_config: Any) -> None:
    """Refuse to compare models that don't predict the same number of tokens.

    Raises:
        PlanError: names both numbers.
    """
    size, reference_size = (
        getattr(each.get_text_config(decoder=True), "vocab_size", None) for each in (config, reference_config)
    )
    if isinstance(size, int) and isinstance(reference_size, int):
        _check_sizes(size, reference_size)


def _check_sizes(size: int, reference_size: int) -> None:
    if size != reference_size:
        raise PlanError(
            f"the model predicts one of {size} tokens, the reference one of {reference_size};"
            " only models with one vocabulary can be compared"
        )


def compare(
    model: Any, reference: Any, windows: Tensor, *, on_windows: Callable[[int], object] | None = None
) -> Comparison:
    """Compare a model's predictions with a reference's, window by window.

    Args:
        model: a causal language model of Transformers, on any devices.
        reference: another with the same vocabulary, such as the model before it was quantized.
        windows: ``int64 [windows, seq_len]``, see :func:`lowbit.bench.token_windows`.
        on_windows: called after each window with 1.

    Raises:
        PlanError: there are no windows, they are longer than a model allows, the vocabularies differ, or logits are not
            finite.
    """
    count, seq_len = windows.shape
    if count == 0 or seq_len < 2:
        raise PlanError(f"{count} windows of {seq_len} tokens predict nothing; at least one of 2 is needed")
    for each in (model, reference):
        check_seq_len(each.config, seq_len)
    check_vocabularies(model.config, reference.config)
    measured = []
    for window in windows:
        measured.append(_compare_window(model, reference, window))
        if on_windows is not None:
            on_windows(1)
    return _summary(measured, count * (seq_len - 1))


def _summary(measured: list[_Window], predicted: int) -> Comparison:
    divergences = torch.stack([window.divergences for window in measured])
    means = divergences.mean(1)
    return Comparison(
        positions=divergences.numel(),
        divergence=float(means.mean()),
        standard_error=float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None,
        percentile_99=_percentile(divergences.flatten(), 0.99),
        agreement=sum(window.matches for window in measured) / divergences.numel(),
        model=Perplexity(sum(window.nll for window in measured), predicted),
        reference=Perplexity(sum(window.reference_nll for window in measured), predicted),
    )


def _percentile(values: Tensor, share: float) -> float:
    """The smallest value that `share` of all don't exceed; torch's quantile stops at 16 million values."""
    return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)


@torch.inference_mode()
def _compare_window(model: Any, reference: Any, window: Tensor) -> _Window:
    scores, wanted = (
        each(input_ids=window[None].to(each.device), use_cache=False).logits[0] for each in (model, reference)
    )
    _check_sizes(scores.shape[-1], wanted.shape[-1])
    divergences = []
    matches, nll, reference_nll = 0, 0.0, 0.0
    for start in range(0, len(window), _STRIP):
        log_q = functional.log_softmax(scores[start : start + _STRIP].float(), -1)
        log_p = functional.log_softmax(wanted[start : start + _STRIP].to(scores.device).float(), -1)
        divergences.append(_divergence(log_p, log_q).cpu())
        matches += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        targets = window[start + 1 : start + 1 + len(log_q)].to(scores.device)
        nll += _nll(log_q, targets)
        reference_nll += _nll(log_p, targets)
    found = _Window(torch.cat(divergences), matches, nll, reference_nll)
    for name, each, loss in (("model", model, nll), ("reference", reference, reference_nll)):
        if not math.isfinite(loss):
            raise PlanError(f"the {name} gives NaN or infinite logits in {each.dtype}; try another dtype")
    if not bool(found.divergences.isfinite().all()):
        raise PlanError("one of the models gives NaN or infinite logits; try another dtype")
    return found


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, ``fp64 [rows]``; what p rules out doesn't count."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64)


def _nll(log_p: Tensor, targets: Tensor) -> float:
    """What is lost on the tokens that follow; none follows the last position."""
    return -float(log_p[: len(targets)].gather(1, targets[:, None]).double().sum())
