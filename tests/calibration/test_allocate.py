"""Bits for each weight: within the budget, as good as can be, and by what errors really cost."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import blocks
import decoders
from lowbit.assets import sample_text
from lowbit.calibration.allocate import Option, Sensitivity, allocate, measure_sensitivity
from lowbit.calibration.data import DataConfig, load_calibration
from lowbit.calibration.tune import divergence
from lowbit.errors import PlanError

Options = dict[str, list[Option]]


def instance(seed: int) -> tuple[Options, dict[str, int], float]:
    """Six weights of several sizes with up to four options; losses fall by about four with every bit, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    options: Options = {}
    sizes: dict[str, int] = {}
    for number in range(6):
        name, sizes[f"w{number}"] = f"w{number}", int(draw(100, 2000))
        base = 10 ** draw(-3, 0)
        widths = [2, 3, 4, 8][: 2 + int(draw(0, 3))]
        options[name] = [
            Option(base * 4.0**-width * draw(0.5, 2), int(sizes[name] * (width + draw(0.1, 0.5)))) for width in widths
        ]
    return options, sizes, draw(2.6, 6.0)


def spent(options: Options, chosen: dict[str, int]) -> tuple[float, int]:
    picked = [options[name][index] for name, index in chosen.items()]
    return sum(option.loss for option in picked), sum(option.bits for option in picked)


def least_loss(options: Options, budget: float) -> float:
    every = itertools.product(*options.values())
    return min(sum(o.loss for o in picked) for picked in every if sum(o.bits for o in picked) <= budget)


def test_the_least_loss_but_for_the_step_of_one_weight() -> None:
    """Against all combinations. A price finds those on the convex hull; between them others may fit the bits better: of
    these 120 instances 96 are exact, and losses are 2.2 % above the least on average.
    """
    exact, excess = 0, []
    for seed in range(120):
        options, sizes, target = instance(seed)
        budget = target * sum(sizes.values())
        chosen = allocate(options, sizes, target)
        loss, bits = spent(options, chosen)
        assert set(chosen) == set(options) and bits <= budget
        best = least_loss(options, budget)
        one_step = max(options[name][index].loss - min(o.loss for o in options[name]) for name, index in chosen.items())
        assert best <= loss * (1 + 1e-9) and loss - best <= one_step + 1e-12
        exact += loss <= best * (1 + 1e-9)
        excess.append(loss / best - 1)
    assert exact >= 90 and sum(excess) / len(excess) < 0.03


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_would_help_still_fits(seed: int) -> None:
    options, sizes, target = instance(seed)
    chosen = allocate(options, sizes, target)
    loss, _ = spent(options, chosen)
    for name, found in options.items():
        for other in range(len(found)):
            changed = spent(options, {**chosen, name: other})
            assert changed[1] > target * sum(sizes.values()) or changed[0] >= loss


def test_more_bits_never_cost_more() -> None:
    options, sizes, _ = instance(3)
    losses = [spent(options, allocate(options, sizes, target))[0] for target in (2.6, 3.0, 3.5, 4.0, 5.0, 9.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == sum(min(option.loss for option in found) for found in options.values())


def test_what_hurts_gets_the_bits() -> None:
    options = {name: [Option(cost, 200), Option(cost / 16, 400)] for name, cost in (("a", 0.1), ("b", 5.0))}
    assert allocate(options, {"a": 100, "b": 100}, 3.0) == {"a": 0, "b": 1}


def test_options_that_cost_more_and_hurt_more_are_left_alone() -> None:
    options = {"a": [Option(1.0, 200), Option(2.0, 300), Option(0.5, 400)]}
    assert allocate(options, {"a": 100}, 3.5) == {"a": 0}
    assert allocate(options, {"a": 100}, 4.0) == {"a": 2}


@pytest.mark.parametrize("loss", [0.0, 1e-30, 1e30])
def test_losses_of_any_size(loss: float) -> None:
    options = {name: [Option(loss, 200), Option(loss / 16, 400)] for name in "abcd"}
    chosen = allocate(options, dict.fromkeys("abcd", 100), 3.0)
    assert sum(chosen.values()) == (2 if loss else 0)


def test_too_few_bits_say_how_many_it_takes() -> None:
    options, sizes, _ = instance(0)
    least = sum(min(option.bits for option in found) for found in options.values()) / sum(sizes.values())
    with pytest.raises(PlanError, match=r"2 bits per weight are not enough: .* the least is \d\.\d\d\d") as raised:
        allocate(options, sizes, 2.0)
    said = float(str(raised.value).rsplit(" ", 1)[1])
    assert least <= said < least + 0.001
    assert spent(options, allocate(options, sizes, said))[1] / sum(sizes.values()) <= said


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_losses_that_are_no_numbers(loss: float) -> None:
    with pytest.raises(PlanError, match="layer 7: what quantizing it costs is"):
        allocate({"layer 7": [Option(0.1, 400), Option(loss, 200)]}, {"layer 7": 100}, 3.0)


def test_divergence_is_the_mean_of_squares() -> None:
    """Over all pairs of an input and a gradient, as the two are taken to be independent."""
    inputs, gradients, error = torch.randn(50, 7).double(), torch.randn(50, 5).double(), torch.randn(5, 7).double()
    measured = Sensitivity(inputs.t() @ inputs, gradients.t() @ gradients, 50)
    naive = [0.5 * float(g @ error @ x) ** 2 for g in gradients for x in inputs]
    assert measured.divergence(error) == pytest.approx(sum(naive) / len(naive), rel=1e-12)


def test_nothing_was_seen() -> None:
    assert Sensitivity(torch.zeros(3, 3), torch.zeros(2, 2)).divergence(torch.ones(2, 3)) == 0


def test_gradients_at_the_head_are_those_of_a_softmax() -> None:
    model = blocks.traced("llama").model
    tokens = torch.randint(3, 64, (4, 16))
    measured = measure_sensitivity(model, ["lm_head"], tokens, batch=4, seed=5)["lm_head"]
    with torch.no_grad():
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    hidden, predicted = out.hidden_states[-1].flatten(0, 1), out.logits.flatten(0, 1).softmax(-1)
    sampled = torch.multinomial(predicted, 1, generator=torch.Generator().manual_seed(5)).squeeze(1)
    gradient = nn.functional.one_hot(sampled, 64) - predicted
    assert measured.tokens == 64
    torch.testing.assert_close(measured.inputs, hidden.t() @ hidden)
    torch.testing.assert_close(measured.gradients, gradient.t() @ gradient)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2"])
def test_every_linear_layer_is_measured_and_the_model_is_left_as_it_was(kind: str) -> None:
    model = decoders.MODELS[kind]().eval().requires_grad_(False)
    kinds = (nn.Linear, t.pytorch_utils.Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    seen: list[int] = []
    tokens = torch.randint(3, 64, (5, 8))
    measured = measure_sensitivity(model, names, tokens, batch=2, advance=seen.append)
    assert set(measured) == set(names) and seen == [2, 2, 1]
    for name, found in measured.items():
        weight = model.get_submodule(name).weight
        expected = weight.shape if isinstance(model.get_submodule(name), nn.Linear) else weight.t().shape
        assert (len(found.gradients), len(found.inputs)) == tuple(expected) and found.tokens == 40
        assert found.divergence(torch.randn(expected)) > 0
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = measure_sensitivity(model, names, tokens, batch=2)
    assert all(torch.equal(again[name].gradients, found.gradients) for name, found in measured.items())


def test_models_with_an_encoder_are_refused() -> None:
    with pytest.raises(PlanError, match="this one has an encoder"):
        measure_sensitivity(decoders.MODELS["t5"](), [], torch.zeros(1, 4, dtype=torch.int64))


def test_it_predicts_the_divergence_of_small_errors(small: Path) -> None:
    """As well as the factorization does: over three seeds (28 layers, 1024 tokens) what was predicted of a layer was
    between 0.30 and 2.5 times what was measured, with medians of 0.92 to 0.97 and rank correlations of 0.91 to 0.94; of
    all layers together 0.87 to 1.02 times.
    """
    tokenizer = t.AutoTokenizer.from_pretrained(small)
    tokens = torch.stack(load_calibration(sample_text(), tokenizer, DataConfig(samples=4, length=128)).samples)
    model = t.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval().requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    sensitivities = measure_sensitivity(model, names, tokens)
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
    errors = {name: 0.03 * model.get_submodule(name).weight.std() for name in names}
    noise = {name: size * torch.randn_like(model.get_submodule(name).weight) for name, size in errors.items()}
    predicted = torch.tensor([sensitivities[name].divergence(noise[name]) for name in names])
    some = list(range(0, len(names), 2))
    measured = torch.tensor([changed(model, tokens, dense, {names[number]: noise[names[number]]}) for number in some])
    ratio = predicted[some] / measured
    assert 0.75 < ratio.median() < 1.33 and ratio.min() > 0.2 and ratio.max() < 5
    assert rank_correlation(predicted[some], measured) > 0.75
    together = changed(model, tokens, dense, noise)
    assert 0.7 < float(predicted.sum()) / together < 1.4


def changed(model: t.PreTrainedModel, tokens: Tensor, dense: Tensor, errors: dict[str, Tensor]) -> float:
    """The divergence that errors of weights bring."""
    kept = {name: model.get_submodule(name).weight.clone() for name in errors}
    with torch.no_grad():
        for name, error in errors.items():
            model.get_submodule(name).weight += error
        found = float(divergence(dense, model(input_ids=tokens).logits))
        for name, weight in kept.items():
            model.get_submodule(name).weight.copy_(weight)
    return found


def rank_correlation(left: Tensor, right: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().float() for values in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])
