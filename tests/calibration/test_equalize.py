"""Equalizing a block: it computes what it did, its weights round better, and its statistics follow."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from blocks import Traced, traced
from lowbit.algorithms import integer_spec
from lowbit.algorithms.awq import ActivationAware, output_error
from lowbit.algorithms.rtn import RoundToNearest
from lowbit.algorithms.statistics import Collector, Statistics
from lowbit.calibration.equalize import equalize_block, scaled_statistics
from lowbit.calibration.matrices import matrices
from lowbit.calibration.pairs import find_pairs
from lowbit.core import QuantSpec

SPEC = integer_spec(bits=4, group_size=16)
NEEDS = frozenset({"hessian", "squares", "magnitudes"})


def _statistics(model: Traced) -> dict[str, Statistics]:
    """Of all linear layers of the block; of fused experts, from the rows that each is given."""
    collectors = {name: Collector(NEEDS) for name in matrices(model.block)}
    handles = []
    for name, matrix in matrices(model.block).items():
        module = model.block.get_submodule(matrix.module)
        if matrix.expert is None:
            handles.append(module.register_forward_hook(lambda _m, args, _o, name=name: collectors[name].add(args[0])))
    model.run()
    for handle in handles:
        handle.remove()
    return {name: collector.finish() for name, collector in collectors.items()}


def _outliers(model: Traced) -> None:
    """Some channels of the norms large, and the columns that read them small, as in large models."""
    for name, module in model.block.named_modules():
        if name.endswith("layernorm"):
            module.weight.data[::7] *= 20
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        model.block.get_submodule(name).weight.data[:, ::7] /= 20


def _error(model: Traced, statistics: dict[str, Statistics], specs: dict[str, QuantSpec]) -> float:
    total = 0.0
    for name in specs:
        weight, hessian = matrices(model.block)[name].weight, statistics[name].hessian
        assert hessian is not None
        total += float(output_error(RoundToNearest().quantize(weight, SPEC).dequantize() - weight, hessian))
    return total


def test_a_block_computes_the_same_and_rounds_better() -> None:
    model = traced("llama")
    _outliers(model)
    pairs, before = find_pairs(model.block, model.run), model.run()
    statistics = _statistics(model)
    specs = dict.fromkeys(matrices(model.block), SPEC)
    plain = _error(model, statistics, specs)
    report = equalize_block(model.block, pairs, statistics, specs)
    assert (model.run() - before).abs().max() < 5e-6 * before.abs().max()
    assert [entry.pair for entry in report] == pairs
    assert all(entry.after <= entry.before and entry.note is None for entry in report)
    assert _error(model, statistics, specs) < 0.5 * plain


def test_statistics_become_those_of_the_scaled_inputs() -> None:
    model = traced("llama")
    _outliers(model)
    statistics = _statistics(model)
    old = dict(statistics)
    equalize_block(
        model.block, find_pairs(model.block, model.run), statistics, dict.fromkeys(matrices(model.block), SPEC)
    )
    measured = _statistics(model)
    for name, found in statistics.items():
        for part in NEEDS:
            assert torch.allclose(getattr(found, part), getattr(measured[name], part), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(old["mlp.up_proj"].hessian, measured["mlp.up_proj"].hessian, rtol=0.1)  # type: ignore[arg-type]


def test_deviations_are_scaled_like_hessians() -> None:
    inputs, dense, scales = torch.randn(50, 8), torch.randn(50, 8), torch.rand(8) + 0.5
    collectors = [Collector(frozenset({"hessian", "deviation"})) for _ in range(2)]
    collectors[0].add(inputs, dense)
    collectors[1].add(inputs / scales, dense / scales)
    scaled, measured = scaled_statistics(collectors[0].finish(), scales), collectors[1].finish()
    assert scaled.deviation is not None and measured.deviation is not None
    assert torch.allclose(scaled.deviation, measured.deviation, atol=1e-5)
    assert scaled.squares is None


def test_pairs_without_anything_to_measure_are_left_alone_and_say_so() -> None:
    model = traced("mixtral")
    pairs = find_pairs(model.block, model.run)
    weights = {name: matrix.weight.clone() for name, matrix in matrices(model.block).items()}
    statistics = _statistics(model)  # none of the experts'
    specs = {name: SPEC for name in weights if "experts" in name}
    report = equalize_block(model.block, pairs, statistics, specs)
    notes = {entry.pair.source: entry.note for entry in report}
    assert notes["input_layernorm"] == "no target is quantized to integers in groups along its inputs"
    assert notes["post_attention_layernorm"] == "its targets saw no tokens"
    assert all(torch.equal(weights[name], matrix.weight) for name, matrix in matrices(model.block).items())


def test_targets_that_stay_dense_are_scaled_with_the_others() -> None:
    model = traced("mixtral")
    pairs, before = find_pairs(model.block, model.run), model.run()
    statistics = _statistics(model)
    seen = statistics["mlp.gate"]  # what the router sees, some expert sees
    assert seen.hessian is not None
    statistics["mlp.experts.0.up_proj"] = seen
    gate = matrices(model.block)["mlp.gate"].weight.clone()
    report = equalize_block(model.block, pairs, statistics, {"mlp.experts.0.up_proj": SPEC})
    (entry,) = (entry for entry in report if entry.note is None)
    assert entry.pair.source == "post_attention_layernorm" and entry.after < entry.before
    assert not torch.equal(matrices(model.block)["mlp.gate"].weight, gate)
    assert (model.run() - before).abs().max() < 5e-6 * before.abs().max()


def test_on_a_real_model_both_searches_lower_the_error(small: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    ids = torch.randint(5, model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    block = model.get_submodule("model.layers.2")
    real = Traced(model, block)
    real.run = lambda: model(input_ids=ids, use_cache=False).logits  # type: ignore[method-assign]
    with torch.no_grad():
        pairs, statistics = find_pairs(block, real.run), _statistics(real)
    spec = integer_spec(bits=3, group_size=128)
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]

    def errors(algorithm: RoundToNearest | ActivationAware) -> float:
        total = 0.0
        for name in names:
            weight, hessian = matrices(block)[name].weight, statistics[name].hessian
            assert hessian is not None
            made = algorithm.calibrated(weight, spec, statistics[name]).dequantize()
            total += float(output_error(made - weight, hessian) / output_error(weight, hessian))
        return total

    plain = errors(RoundToNearest())
    equalize_block(block, pairs, statistics, dict.fromkeys(names, spec))
    scaled, clipped = errors(RoundToNearest()), errors(ActivationAware())
    assert scaled < 0.97 * plain
    assert clipped < 0.9 * scaled
