"""Which weight gets how many bits: the least loss of predictions for the bytes that there are.

How much a weight's error costs is measured once, on the dense model: with ``x`` the inputs of a layer and ``g`` the
gradient of the log-likelihood of a sampled token with respect to its outputs, the expected divergence that an error
``D`` of its weight brings is ``tr(G D H Dᵀ) / 2``, with ``H`` the mean of ``x xᵀ`` and ``G`` that of ``g gᵀ``: the
Fisher information, taken to be a product as in K-FAC (arXiv:1503.05671), and divergences of layers added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import PlanError

_HALVINGS = 100


@dataclass
class Sensitivity:
    """What an error of a linear layer's weight costs.

    Attributes:
        inputs: ``fp32 [in, in]``, the sum of ``x xᵀ``.
        gradients: ``fp32 [out, out]``, the sum of ``g gᵀ``.
        tokens: how many there were.
    """

    inputs: Tensor
    gradients: Tensor
    tokens: int = 0

    def divergence(self, error: Tensor) -> float:
        """Nats per token that ``error [out, in]`` of the weight brings, as far as this model of it goes."""
        count = max(1, self.tokens)
        product = (self.gradients / count) @ error @ (self.inputs / count)
        return 0.5 * float((product * error).sum())


@dataclass
class _Gatherer:
    sensitivities: dict[str, Sensitivity] = field(default_factory=dict)

    def hook(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            del module
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            entry = self._entry(name, rows.shape[1], output.shape[-1], rows.device)
            entry.inputs += rows.t() @ rows
            entry.tokens += len(rows)
            output.register_hook(lambda gradient: self._add_gradient(entry, gradient))

        return watch

    def _entry(self, name: str, in_features: int, out_features: int, device: torch.device) -> Sensitivity:
        if name not in self.sensitivities:
            inputs = torch.zeros(in_features, in_features, device=device)
            self.sensitivities[name] = Sensitivity(inputs, torch.zeros(out_features, out_features, device=device))
        return self.sensitivities[name]

    @staticmethod
    def _add_gradient(entry: Sensitivity, gradient: Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        entry.gradients += rows.t() @ rows


def measure_sensitivity(
    model: Any,
    names: Sequence[str],
    tokens: Tensor,
    *,
    batch: int = 2,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> dict[str, Sensitivity]:
    """Run a dense causal language model forwards and backwards.

    Args:
        model: in memory, on one device, in fp32.
        names: of the linear layers.
        tokens: ``int64 [sequences, length]``.
        batch: sequences at once.
        seed: for the tokens that are sampled from the model's own predictions.
        advance: called with the number of sequences after each batch.

    Raises:
        PlanError: the model has an encoder.
    """
    if model.config.is_encoder_decoder:
        raise PlanError("sensitivities are measured on models that predict the next token; this one has an encoder")
    gatherer = _Gatherer()
    generator = torch.Generator(device=model.device).manual_seed(seed)
    anchor = model.get_input_embeddings()
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(gatherer.hook(name))
            stack.callback(handle.remove)
        for part in tokens.split(batch):
            embedded = anchor(part.to(model.device)).detach().requires_grad_(True)
            logits = model(inputs_embeds=embedded, use_cache=False).logits.float().flatten(0, 1)
            with torch.no_grad():
                sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            torch.log_softmax(logits, -1).gather(1, sampled).sum().backward()
            advance(len(part))
    return gatherer.sensitivities


@dataclass(frozen=True)
class Option:
    """One way to quantize a weight.

    Attributes:
        loss: the divergence that it is expected to bring.
        bits: that it takes in all, with everything that is stored beside the codes.
    """

    loss: float
    bits: int


def allocate(options: Mapping[str, Sequence[Option]], weights: Mapping[str, int], target: float) -> dict[str, int]:
    """Choose an option for every weight so that the loss is least and the bits per weight stay under the target.

    The choice at one price of bits for all, found by bisection; what is then left of the bits goes where it helps most.

    Args:
        options: by weight.
        weights: how many numbers each holds.
        target: bits per weight, over all.

    Returns:
        By weight, the index of its option.

    Raises:
        PlanError: even the smallest options take more, or a loss is NaN or infinite.
    """
    for name, found in options.items():
        if not all(math.isfinite(option.loss) for option in found):
            raise PlanError(
                f"{name}: what quantizing it costs is {[option.loss for option in found]}; it can't be weighed"
            )
    budget = target * sum(weights.values())
    least = sum(min(option.bits for option in found) for found in options.values())
    if least > budget:
        raise PlanError(
            f"{target:g} bits per weight are not enough: with all that is stored beside the codes, the least is "
            f"{math.ceil(1000 * least / sum(weights.values())) / 1000:.3f}"
        )
    low, high = 0.0, 1.0
    while _bits(options, _at_price(options, high)) > budget:
        high *= 16
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _bits(options, _at_price(options, middle)) > budget:
            low = middle
        else:
            high = middle
    return _spend(options, _at_price(options, high), budget)


def _at_price(options: Mapping[str, Sequence[Option]], price: float) -> dict[str, int]:
    """The best option of each weight where a bit costs so much loss."""
    return {
        name: min(
            range(len(found)), key=lambda index: (found[index].loss + price * found[index].bits, found[index].bits)
        )
        for name, found in options.items()
    }


def _bits(options: Mapping[str, Sequence[Option]], chosen: Mapping[str, int]) -> int:
    return sum(options[name][index].bits for name, index in chosen.items())


def _spend(options: Mapping[str, Sequence[Option]], chosen: dict[str, int], budget: float) -> dict[str, int]:
    while True:
        left = budget - _bits(options, chosen)
        best: tuple[float, str, int] | None = None
        for name, index in chosen.items():
            now = options[name][index]
            for other, option in enumerate(options[name]):
                more, gain = option.bits - now.bits, now.loss - option.loss
                if 0 < more <= left and gain > 0 and (best is None or gain / more > best[0]):
                    best = (gain / more, name, other)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
