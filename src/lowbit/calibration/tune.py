"""Learning what is quantized by gradient descent: a block, or a whole model, against its dense self.

A block: SignRound (arXiv:2309.05516), steps of fixed length against the sign of the gradient, or Adam. A whole model:
the Kullback-Leibler divergence from the dense model's predictions, and the squared differences of the hidden states
behind every block relative to their squares, which keep so few tokens from being learned by heart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lowbit.calibration.rounding import LearnedWeight
from lowbit.calibration.units import Unit
from lowbit.core import QuantTensor, unpack
from lowbit.errors import PlanError
from lowbit.nn.swap import is_conv1d

_WARM_UP = 0.05
_LAST_RATE = 0.02
_LOGIT_BYTES = 1 << 30  # of one forward pass, in fp32


@dataclass(frozen=True)
class TuneConfig:
    """How to learn.

    Attributes:
        optimizer: ``sign`` (SignRound) or ``adam``.
        steps: for blocks, how many; for models, see `epochs`.
        epochs: for models, how often all calibration tokens are seen.
        batch: sequences per step.
        rate: for codes, in steps of the grid.
        scale_rate: for the logarithm of scales; zero points take `rate`.
        norm_rate: for norms and biases, which then change too; 0 leaves them alone.
        hidden_weight: of the hidden states' error, for models.
        bound: how far codes may move, in steps of the grid; None for anywhere.
        seed: for the order of the sequences.
    """

    optimizer: Literal["sign", "adam"] = "adam"
    steps: int = 200
    epochs: int = 12
    batch: int = 8
    rate: float = 2e-3
    scale_rate: float = 1e-3
    norm_rate: float = 1e-4
    hidden_weight: float = 5.0
    bound: float | None = None
    seed: int = 0


SIGN_ROUND = TuneConfig("sign", rate=5e-3, scale_rate=5e-3, norm_rate=0.0, bound=0.5)


class SignDescent(torch.optim.Optimizer):
    """Moves every number by the learning rate, against the sign of its gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


class Student:
    """A module whose units are learned weights: computes with them through the module itself, which stays dense.

    Args:
        module: dense, in memory, named `prefix` in its model (empty for the model itself).
        units: those that are learned.
        quantized: where learning starts, by unit; units that can't be learned are used as they are.
        config: says what may move.
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        units: Sequence[Unit],
        quantized: Mapping[str, QuantTensor],
        config: TuneConfig,
    ) -> None:
        self.module, self.config = module.requires_grad_(False), config
        self.weights: dict[str, LearnedWeight] = {}
        self._owners: dict[str, list[Unit]] = {}
        self._prefix = f"{prefix}." if prefix else ""
        for unit in units:
            owner = module.get_submodule(self._local(unit.module))
            tensor = quantized[unit.name]
            symmetric = _is_symmetric(tensor)
            self.weights[unit.name] = LearnedWeight(
                unit.weight(owner).float(), tensor, learn_zero=not symmetric, bound=config.bound
            )
            self._owners.setdefault(unit.full_parameter.removeprefix(self._prefix), []).append(unit)
        self.norms: dict[str, nn.Parameter] = {}
        self._norm_dtypes: dict[str, torch.dtype] = {}
        if config.norm_rate:
            self._learn_norms()

    def _local(self, name: str) -> str:
        """The name of a module within this one."""
        return name.removeprefix(self._prefix) if f"{name}." != self._prefix else ""

    def _learn_norms(self) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                self.norms[name] = nn.Parameter(parameter.detach().float().clone())
                self._norm_dtypes[name] = parameter.dtype

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All that is learned, by names that are the same in every run."""
        for unit, weight in self.weights.items():
            for name, parameter in weight.named_parameters():
                yield f"{unit}::{name}", parameter
        yield from ((f"norm::{name}", parameter) for name, parameter in self.norms.items())

    def optimizer(self) -> torch.optim.Optimizer:
        """With a rate for each kind of parameter."""
        config, kinds = (
            self.config,
            {"offset": self.config.rate, "zero": self.config.rate, "stretch": self.config.scale_rate},
        )
        groups = [
            {"params": [value for name, value in self.parameters() if name.endswith(f"::{kind}")], "lr": rate}
            for kind, rate in kinds.items()
        ]
        groups.append({"params": list(self.norms.values()), "lr": config.norm_rate})
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "sign":
            return SignDescent(groups, config.rate)
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def replacements(self) -> dict[str, Tensor]:
        """The parameters of the module that differ from the dense ones."""
        made: dict[str, Tensor] = {}
        for parameter, units in self._owners.items():
            dense = self.module.get_parameter(parameter)
            made[parameter] = self._parameter(units, dense)
        for name, value in self.norms.items():
            made[name] = value + (value.to(self._norm_dtypes[name]).float() - value).detach()
            made[name] = made[name].to(self.module.get_parameter(name).dtype)
        return made

    def _parameter(self, units: list[Unit], dense: Tensor) -> Tensor:
        values = [self.weights[unit.name]().to(dense.dtype) for unit in units]
        projection = units[0].projection
        if projection is None:
            return values[0].t() if is_conv1d(self.module.get_submodule(self._local(units[0].module))) else values[0]
        parts = {
            part: torch.stack([value for unit, value in zip(units, values, strict=True) if unit.part == part])
            for part in projection.parts
        }
        return projection.join(parts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.replacements(), args, kwargs, tie_weights=False)

    def finish(self) -> tuple[dict[str, QuantTensor], dict[str, Tensor]]:
        """The quantized weights by unit, and the norms by full name."""
        units = {name: weight.finish().to("cpu") for name, weight in self.weights.items()}
        norms = {
            f"{self._prefix}{name}": value.detach().to(self._norm_dtypes[name]) for name, value in self.norms.items()
        }
        return units, norms


def _is_symmetric(tensor: QuantTensor) -> bool:
    """Whether every zero point is the middle of the range, as formats of symmetric weights have it."""
    spec = tensor.spec
    if spec.zero is None or spec.zero.kind != "integer":
        return False
    zeros = unpack(tensor.tensors["zeros"], spec.zero.bits, spec.grouping.counts(tensor.shape)[-1])
    return bool((zeros == 1 << spec.bits - 1).all())


def rate_at(step: int, steps: int, optimizer: str) -> float:
    """The learning rate at a step, as a fraction: down to 0 in a line (SignRound), or a cosine with a warm-up."""
    if optimizer == "sign":
        return 1 - step / steps
    warm = min(1.0, (step + 1) / max(1.0, _WARM_UP * steps))
    return warm * ((1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)) + _LAST_RATE)


def tune_block(
    student: Student,
    call: Callable[[Callable[..., Any], int, Tensor], Tensor],
    inputs: Callable[[int], Tensor],
    targets: Callable[[int], Tensor],
    batches: Sequence[int],
) -> float:
    """Learn a block's weights so that its outputs come near to `targets`; starts over from nothing where they don't.

    Args:
        student: of the block.
        call: runs a block ``(block, batch, hidden)`` with the arguments of that batch.
        inputs: hidden states ``[sequences, tokens, features]`` of a batch.
        targets: what the block should give for them.
        batches: all numbers of batches.

    Returns:
        The error after, relative to the error before.
    """
    config, generator = student.config, torch.Generator().manual_seed(student.config.seed)
    optimizer = student.optimizer()
    base = [group["lr"] for group in optimizer.param_groups]
    scale = 1.0 / max(1e-12, float(sum(targets(batch).float().square().mean() for batch in batches) / len(batches)))

    def loss_of(batch: int) -> Tensor:
        difference = call(student, batch, inputs(batch)).float() - targets(batch).float()
        return difference.square().mean() * scale

    def total() -> float:
        with torch.no_grad():
            return float(sum(loss_of(batch) for batch in batches) / len(batches))

    before = total()
    order: list[int] = []
    for step in range(config.steps):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * rate_at(step, config.steps, config.optimizer)
        if not order:
            order = [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
        loss = loss_of(order.pop())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    after = total()
    if not after < before:
        _reset(student)
        return 1.0
    return after / before if before > 0 else 1.0


def _reset(student: Student) -> None:
    """Back to where learning started: it made things worse."""
    with torch.no_grad():
        for weight in student.weights.values():
            weight.offset.zero_()
            weight.stretch.zero_()
            if weight.zero is not None and weight.first_zero is not None:
                weight.zero.copy_(weight.first_zero)
        for name, value in student.norms.items():
            value.copy_(student.module.get_parameter(name).float())


class Distillation:
    """Learning of a whole model from its dense self; a step at a time, so that it can be stopped and resumed.

    Args:
        student: of the whole model, which is a causal language model.
        tokens: ``int64 [sequences, length]``.
        device: where the model is.
    """

    def __init__(self, student: Student, tokens: Tensor, device: torch.device) -> None:
        self.student, self.tokens, self.device = student, tokens, device
        config = student.config
        self.per_epoch = max(1, len(tokens) // config.batch)
        self.steps = config.epochs * self.per_epoch
        self.step = 0
        self.optimizer = student.optimizer()
        self._base = [group["lr"] for group in self.optimizer.param_groups]
        self.loss = math.nan

    def state(self) -> dict[str, Tensor]:
        """All that a process needs to go on with, by name."""
        found = {}
        for name, parameter in self.student.parameters():
            found[f"value::{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{key}::{name}"] = torch.as_tensor(value)
        return found

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from :meth:`state`."""
        self.step = step
        with torch.no_grad():
            for name, parameter in self.student.parameters():
                parameter.copy_(state[f"value::{name}"].to(parameter.device))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}::{name}" in state]
                own = {key: state[f"{key}::{name}"].clone() for key in keys}
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
                }

    def run_epoch(self, advance: Callable[[int], object] = lambda done: None) -> None:
        """See all tokens once.

        Raises:
            PlanError: the loss is NaN or infinite.
        """
        config, epoch = self.student.config, self.step // self.per_epoch
        generator = torch.Generator().manual_seed(config.seed + 1_000_003 * epoch)
        order = torch.randperm(len(self.tokens), generator=generator)[: self.per_epoch * config.batch]
        for chosen in order.split(config.batch):
            for group, rate in zip(self.optimizer.param_groups, self._base, strict=True):
                group["lr"] = rate * rate_at(self.step, self.steps, config.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
            self.loss = self._accumulate(self.tokens[chosen])
            if not math.isfinite(self.loss):
                raise PlanError(f"learning failed at step {self.step}: the loss is {self.loss}; lower the rate")
            self.optimizer.step()
            self.step += 1
            advance(1)

    def _accumulate(self, tokens: Tensor) -> float:
        """Gradients of a step, of few sequences at a time where the logits are large.

        The error of hidden states is relative to the squares of those few, not of the whole batch.
        """
        model: Any = self.student.module
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        fitting = max(1, _LOGIT_BYTES // (4 * tokens.shape[1] * vocabulary))
        total = 0.0
        for part in tokens.split(fitting):
            loss = self._loss(part.to(self.device)) * (len(part) / len(tokens))
            loss.backward()
            total += float(loss.detach())
        return total

    def _loss(self, tokens: Tensor) -> Tensor:
        arguments = {"input_ids": tokens, "use_cache": False, "output_hidden_states": True}
        with self._autocast():
            with torch.no_grad():
                dense = self.student.module(**arguments)
            out = self.student(**arguments)
        loss = divergence(dense.logits, out.logits)
        if self.student.config.hidden_weight:
            pairs = list(zip(out.hidden_states[1:], dense.hidden_states[1:], strict=True))
            errors = [
                (mine.float() - theirs.float()).square().mean() / theirs.float().square().mean()
                for mine, theirs in pairs
            ]
            loss = loss + self.student.config.hidden_weight * torch.stack(errors).mean()
        return loss

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """``KL(dense || logits)`` per token, in nats; logits ``[..., vocabulary]``."""
    theirs = functional.log_softmax(dense.float(), -1)
    mine = functional.log_softmax(logits.float(), -1)
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()
