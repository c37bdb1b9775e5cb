"""Learning: optimizers, blocks and whole models that come nearer to their dense selves, and stop when told to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import blocks
from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.calibration import tune
from lowbit.calibration.tune import (
    SIGN_ROUND,
    Distillation,
    SignDescent,
    Student,
    TuneConfig,
    divergence,
    rate_at,
    tune_block,
)
from lowbit.calibration.units import Unit, find_units, units_below
from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import PlanError
from lowbit.nn import plan_model

TWO_BITS, FOUR_BITS = integer_spec(2, 16), integer_spec(4, 16)
CPU = torch.device("cpu")


def quantized(model: nn.Module, spec: QuantSpec, prefix: str = "") -> tuple[list[Unit], dict[str, QuantTensor]]:
    """The units of a model's blocks and what round-to-nearest makes of them."""
    plan = plan_model(model, spec, skip=["lm_head"])
    units = find_units(model, plan)
    units = units_below(units, prefix) if prefix else units
    made = {
        unit.name: RoundToNearest().quantize(unit.weight(model.get_submodule(unit.module)).float(), unit.spec)
        for unit in units
    }
    return units, made


def student_of(model: nn.Module, spec: QuantSpec, config: TuneConfig, prefix: str = "") -> Student:
    units, made = quantized(model, spec, prefix)
    return Student(model.get_submodule(prefix), prefix, units, made, config)


def values_of(student: Student) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in student.parameters()}


# ------------------------------------------------------------------------------------------------------------ optimizer


def test_sign_descent_moves_by_the_rate() -> None:
    moved, still = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Parameter(torch.tensor([5.0]))
    optimizer = SignDescent([{"params": [moved, still], "lr": 0.25}], 1.0)
    (moved * torch.tensor([1e-9, 0.0, -1e9])).sum().backward()
    optimizer.step()
    assert moved.tolist() == [0.75, 2.0, 3.25] and still.tolist() == [5.0]


def test_rates_of_sign_descent_fall_in_a_line() -> None:
    assert [rate_at(step, 4, "sign") for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_rates_of_adam_warm_up_and_fall_as_a_cosine() -> None:
    rates = [rate_at(step, 200, "adam") for step in range(200)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == max(rates) > 0.99
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.51) and rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert 0 < rate_at(0, 1, "adam") <= 1


# ------------------------------------------------------------------------------------------------------------- students


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss", "opt", "falcon"])
def test_a_student_computes_what_the_model_with_dequantized_weights_does(kind: str) -> None:
    """Conv1D, square ones too, and experts, whose parts lie in one parameter, turned or interleaved, among them."""
    ours, theirs = blocks.traced(kind), blocks.traced(kind)
    student = student_of(ours.model, FOUR_BITS, TuneConfig(norm_rate=0.0))
    units, made = quantized(theirs.model, FOUR_BITS)
    dense = theirs.run()
    for unit in units:
        unit.weight(theirs.model.get_submodule(unit.module)).copy_(made[unit.name].dequantize())
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = student(input_ids=ids, use_cache=False).logits
    expected = theirs.run()
    assert torch.equal(logits, expected) and not torch.allclose(expected, dense, atol=1e-2)
    assert {unit.name for unit in units} == set(student.weights)
    assert torch.equal(ours.run(), dense)  # the module itself stays dense


def test_the_student_of_a_single_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    units, made = quantized(model, FOUR_BITS)
    own = [unit for unit in units if unit.module == "2"]
    student = Student(model[2], "2", own, made, TuneConfig())
    inputs = torch.randn(3, 32)
    expected = functional.linear(inputs, made["2"].dequantize(), model[2].bias)
    assert torch.equal(student(inputs).detach(), expected)
    assert set(student.finish()[1]) == {"2.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_learned_norms_come_back_in_their_dtype(dtype: torch.dtype) -> None:
    traced = blocks.traced("qwen2")
    traced.model.to(dtype)
    student = student_of(traced.model, FOUR_BITS, TuneConfig(), "model.layers.1")
    assert all(value.dtype == torch.float32 for value in student.norms.values())
    with torch.no_grad():
        for value in student.norms.values():
            value += 0.01
    units, norms = student.finish()
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"self_attn.{letter}_proj.bias" for letter in "qkv"]
    assert set(norms) == {f"model.layers.1.{name}" for name in names}
    used = student.replacements()
    for name, value in norms.items():
        own = name.removeprefix("model.layers.1.")
        assert value.dtype == dtype and torch.equal(value, used[own].detach())
        assert not torch.equal(value, traced.block.get_parameter(own))
    assert set(units) == set(student.weights) and len(units) == 7


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_points_of_symmetric_weights_are_not_learned(symmetric: bool) -> None:
    layer = nn.Sequential(nn.Linear(32, 16))
    plan = plan_model(layer, FOUR_BITS)
    made = {"0": RoundToNearest(symmetric).quantize(layer[0].weight.detach(), FOUR_BITS)}
    student = Student(layer, "", find_units(layer, plan), made, TuneConfig())
    assert ("0::zero" in dict(student.parameters())) is not symmetric


def test_each_kind_of_parameter_has_its_rate() -> None:
    config = TuneConfig(rate=1.0, scale_rate=2.0, norm_rate=3.0)
    student = student_of(blocks.traced("llama").model, FOUR_BITS, config)
    rates = {id(p): group["lr"] for group in student.optimizer().param_groups for p in group["params"]}
    expected = {"offset": 1.0, "zero": 1.0, "stretch": 2.0}
    for name, parameter in student.parameters():
        wanted = 3.0 if name.startswith("norm::") else expected[name.rpartition("::")[2]]
        assert rates.pop(id(parameter)) == wanted
    assert not rates


# --------------------------------------------------------------------------------------------------------------- blocks


class Block:
    """A Llama block with the hidden states of four batches before it and what it makes of them."""

    def __init__(self) -> None:
        traced = blocks.traced("llama")
        self.model, self.block = traced.model, traced.block
        generator = torch.Generator().manual_seed(0)
        self.hidden = [torch.randn(2, 16, 32, generator=generator) for _ in range(4)]
        places = torch.arange(16).unsqueeze(0)
        self.rotary = self.model.model.rotary_emb(self.hidden[0], places)
        with torch.no_grad():
            self.targets = [self.call(self.block, number, hidden) for number, hidden in enumerate(self.hidden)]

    def call(self, block: Callable[..., Any], batch: int, hidden: Tensor) -> Tensor:
        del batch
        return block(hidden, position_embeddings=self.rotary)

    def student(self, config: TuneConfig) -> Student:
        return student_of(self.model, TWO_BITS, config, "model.layers.1")

    def learn(self, student: Student, targets: list[Tensor] | None = None) -> float:
        wanted = self.targets if targets is None else targets
        return tune_block(student, self.call, self.hidden.__getitem__, wanted.__getitem__, range(4))

    def error(self, student: Student) -> float:
        with torch.no_grad():
            made = [self.call(student, number, hidden) for number, hidden in enumerate(self.hidden)]
        return sum(float((a - b).square().mean()) for a, b in zip(made, self.targets, strict=True))


@pytest.mark.parametrize(
    "config", [replace(SIGN_ROUND, steps=60), TuneConfig(steps=60, rate=1e-2)], ids=["sign", "adam"]
)
def test_blocks_come_nearer_to_their_dense_selves(config: TuneConfig) -> None:
    block = Block()
    student = block.student(config)
    before = block.error(student)
    ratio = block.learn(student)
    assert ratio < 0.8
    assert block.error(student) / before == pytest.approx(ratio, rel=1e-4)
    again = block.student(config)
    block.learn(again)
    assert all(made.equal(again.finish()[0][name]) for name, made in student.finish()[0].items())


def test_what_is_filed_is_what_was_learned() -> None:
    block = Block()
    student = block.student(TuneConfig(steps=20))
    block.learn(student)
    units, norms = student.finish()
    error = block.error(student)
    with torch.no_grad():
        for unit in units_below(find_units(block.model, plan_model(block.model, TWO_BITS)), "model.layers.1"):
            unit.weight(block.model.get_submodule(unit.module)).copy_(units[unit.name].dequantize())
        for name, value in norms.items():
            block.model.get_parameter(name).copy_(value)
        made = [block.call(block.block, number, hidden) for number, hidden in enumerate(block.hidden)]
    assert sum(float((a - b).square().mean()) for a, b in zip(made, block.targets, strict=True)) == error


@pytest.mark.parametrize("rate", [30.0, math.nan], ids=["too large a rate", "NaN"])
def test_learning_that_makes_it_worse_is_undone(rate: float) -> None:
    block = Block()
    student = block.student(TuneConfig(steps=5, rate=rate, scale_rate=rate, norm_rate=rate))
    start = values_of(student)
    before = student.finish()[0]
    assert block.learn(student) == 1.0
    assert all(torch.equal(value, start[name]) for name, value in values_of(student).items())
    assert all(made.equal(before[name]) for name, made in student.finish()[0].items())


def test_a_block_without_error_stays() -> None:
    block = Block()
    student = block.student(TuneConfig(steps=5))
    with torch.no_grad():
        exact = [block.call(student, number, hidden) for number, hidden in enumerate(block.hidden)]
    assert block.learn(student, exact) == 1.0


# --------------------------------------------------------------------------------------------------------------- models


CONFIG = TuneConfig(epochs=3, batch=4, rate=1e-2, scale_rate=3e-3, norm_rate=1e-3)


def distillation(config: TuneConfig = CONFIG, kind: str = "llama") -> Distillation:
    tokens = torch.randint(3, 64, (10, 16), generator=torch.Generator().manual_seed(1))
    return Distillation(student_of(blocks.traced(kind).model, TWO_BITS, config), tokens, CPU)


def loss_of(work: Distillation) -> float:
    with torch.no_grad():
        return float(work._loss(work.tokens))


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_a_model_comes_nearer_to_its_dense_self(kind: str) -> None:
    work = distillation(replace(CONFIG, epochs=15, rate=2e-2, scale_rate=1e-2), kind)
    assert (work.per_epoch, work.steps) == (2, 30)
    before = loss_of(work)
    seen: list[int] = []
    while work.step < work.steps:
        work.run_epoch(seen.append)
    assert seen == [1] * 30 and math.isfinite(work.loss)
    assert loss_of(work) < 0.65 * before
    assert all(parameter.grad is None for parameter in work.student.module.parameters())


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_another_process_goes_on_to_the_same_bits(optimizer: Any) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    straight, first, second = distillation(config), distillation(config), distillation(config)
    for _ in range(3):
        straight.run_epoch()
    first.run_epoch()
    kept = {name: value.clone() for name, value in first.state().items()}
    first.run_epoch()  # what was kept doesn't follow
    second.restore(kept, 2)
    second.run_epoch()
    second.run_epoch()
    expected = values_of(straight.student)
    assert all(torch.equal(value, expected[name]) for name, value in values_of(second.student).items())
    assert second.loss == straight.loss and second.step == straight.step == 6
    assert set(second.state()) == set(straight.state())


def test_parts_of_a_batch_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (distillation(replace(CONFIG, hidden_weight=0.0)) for _ in range(2))
    loss = whole._accumulate(whole.tokens[:5])
    calls: list[int] = []
    plain = parts._loss
    monkeypatch.setattr(parts, "_loss", lambda tokens: (calls.append(len(tokens)), plain(tokens))[1])
    monkeypatch.setattr(tune, "_LOGIT_BYTES", 2 * 4 * 16 * 64)
    assert parts._accumulate(parts.tokens[:5]) == pytest.approx(loss, rel=1e-6)
    assert calls == [2, 2, 1]
    for (_, left), (_, right) in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        assert (left.grad - right.grad).norm() <= 1e-5 * left.grad.norm()


def test_hidden_states_are_compared_relative_to_those_of_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    work = distillation()
    monkeypatch.setattr(tune, "_LOGIT_BYTES", 2 * 4 * 16 * 64)
    with torch.no_grad():
        each = [len(part) * float(work._loss(part)) for part in work.tokens[:5].split(2)]
    assert work._accumulate(work.tokens[:5]) == pytest.approx(sum(each) / 5, rel=1e-6)


def test_losses_that_are_no_numbers_end_it() -> None:
    work = distillation()
    before = values_of(work.student)
    with torch.no_grad():
        work.student.module.lm_head.weight[0, 0] = math.nan
    with pytest.raises(PlanError, match="learning failed at step 0: the loss is nan; lower the rate"):
        work.run_epoch()
    assert all(torch.equal(value, before[name]) for name, value in values_of(work.student).items())


def test_fewer_sequences_than_a_batch() -> None:
    student = student_of(blocks.traced("llama").model, TWO_BITS, CONFIG)
    work = Distillation(student, torch.randint(3, 64, (2, 8)), CPU)
    assert (work.per_epoch, work.steps) == (1, 3)
    work.run_epoch()
    assert work.step == 1 and math.isfinite(work.loss)


def test_every_epoch_has_its_own_order_and_a_seed_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[list[int]]] = []
    for seed in (0, 0, 1):
        work = distillation(replace(CONFIG, seed=seed))
        seen: list[list[int]] = []
        monkeypatch.setattr(work, "_accumulate", lambda tokens, seen=seen: seen.append(tokens[:, 0].tolist()) or 0.0)
        work.run_epoch()
        work.run_epoch()
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:2] != orders[0][2:]


def test_the_divergence_is_torchs() -> None:
    dense, logits = 3 * torch.randn(2, 5, 11), 3 * torch.randn(2, 5, 11)
    log = [functional.log_softmax(values.flatten(0, 1), -1) for values in (logits, dense)]
    expected = functional.kl_div(*log, reduction="batchmean", log_target=True)
    torch.testing.assert_close(divergence(dense, logits), expected)
    assert divergence(dense, dense) == 0 and divergence(dense, logits) > 0
    torch.testing.assert_close(divergence(dense, logits + 7.0), expected)
