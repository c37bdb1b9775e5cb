"""AWQ's searches: that they lower the error they are to lower, and what they do at the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.algorithms.awq import (
    ActivationAware,
    clip_groups,
    output_error,
    round_trip,
    search_clip,
    search_scales,
)
from lowbit.algorithms.grid import Grid
from lowbit.algorithms.statistics import Collector, Statistics
from lowbit.core import Grouping, IntCode, QuantSpec, Scale, Zero
from lowbit.errors import PlanError

SPEC = integer_spec(bits=4, group_size=32)
SPECS = {
    "asymmetric": SPEC,
    "three bits": integer_spec(bits=3, group_size=32),
    "per channel": integer_spec(bits=8, group_size=-1),
    "symmetric": QuantSpec(IntCode(4, signed=True), Scale(torch.float16), Grouping.groups(32)),
    "real zero": replace(SPEC, zero=Zero("float", dtype=torch.float16)),
    "additive": replace(SPEC, zero=Zero("additive", dtype=torch.float32)),
    "short last group": integer_spec(bits=4, group_size=40),
}


def _layer(out: int = 24, size: int = 96) -> tuple[Tensor, Tensor, Statistics]:
    """A weight, inputs of which some channels are large and which are correlated, and their statistics."""
    inputs = torch.randn(400, size) @ (torch.eye(size) + 0.3 * torch.randn(size, size) / size**0.5)
    inputs[:, ::11] *= 12
    weight = torch.randn(out, size) * torch.rand(size).add(0.2)
    weight[torch.rand_like(weight) < 0.02] *= 4
    collector = Collector(ActivationAware.needs)
    collector.add(inputs)
    return weight, inputs, collector.finish()


def _hessian(statistics: Statistics) -> Tensor:
    assert statistics.hessian is not None
    return statistics.hessian


def test_the_trace_is_the_mean_squared_error_of_the_outputs() -> None:
    weight, inputs, statistics = _layer()
    difference = round_trip(weight, Grid(SPEC, False, weight.device)) - weight
    direct = (inputs.double() @ difference.double().t()).square().sum(1).mean()
    assert float(output_error(difference, _hessian(statistics))) == pytest.approx(float(direct), rel=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_round_trip_is_what_round_to_nearest_stores(spec: QuantSpec) -> None:
    weight, _, _ = _layer()
    stored = RoundToNearest().quantize(weight, spec).dequantize()
    assert torch.allclose(round_trip(weight, Grid(spec, False, weight.device)), stored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_clipping_lowers_the_error_of_the_outputs(spec: QuantSpec) -> None:
    weight, _, statistics = _layer()
    errors = [
        float(output_error(algorithm.calibrated(weight, spec, statistics).dequantize() - weight, _hessian(statistics)))
        for algorithm in (RoundToNearest(), ActivationAware())
    ]
    assert errors[1] < (1.0 if spec.bits == 8 else 0.97) * errors[0]


def test_each_group_of_each_row_gets_no_worse_in_its_own_error() -> None:
    weight, _, statistics = _layer()
    low, high = search_clip(weight, SPEC, _hessian(statistics))
    assert low.shape == high.shape == (24, 3)
    clipped = RoundToNearest().quantize(clip_groups(weight, SPEC, low, high), SPEC).dequantize() - weight
    plain = RoundToNearest().quantize(weight, SPEC).dequantize() - weight
    for group in range(3):
        part = slice(32 * group, 32 * (group + 1))
        block = _hessian(statistics)[part, part]
        before, after = (((d[:, part] @ block) * d[:, part]).sum(1) for d in (plain, clipped))
        assert (after <= before * 1.0001).all()
        assert after.sum() < 0.97 * before.sum()


def test_ranges_keep_at_least_what_the_search_may_not_give_up() -> None:
    weight, _, statistics = _layer()
    groups = weight.view(24, 3, 32)
    for shrink in (0.0, 0.2):
        low, high = search_clip(weight, SPECS["symmetric"], _hessian(statistics), max_shrink=shrink)
        assert (low >= groups.amin(-1)).all() and (low <= (1 - shrink - 1e-6) * groups.amin(-1)).all()
        assert (high <= groups.amax(-1)).all() and (high >= (1 - shrink - 1e-6) * groups.amax(-1)).all()


def test_scales_protect_the_channels_that_large_activations_meet() -> None:
    weight, _, statistics = _layer()
    assert statistics.magnitudes is not None
    found = search_scales([weight], [SPEC], [_hessian(statistics)], statistics.magnitudes)
    assert found.after < 0.7 * found.before
    assert found.scales[::11].mean() > 1.5 * found.scales.mean()
    rounded = round_trip(weight * found.scales, Grid(SPEC, False, weight.device)) / found.scales
    assert float(output_error(rounded - weight, _hessian(statistics))) == pytest.approx(found.after, rel=1e-6)


def test_weights_with_the_same_inputs_are_searched_together() -> None:
    weight, _, statistics = _layer()
    other = torch.randn(8, 96)
    hessian, magnitudes = _hessian(statistics), statistics.magnitudes
    assert magnitudes is not None
    both = search_scales([weight, other], [SPEC, SPEC], [hessian] * 2, magnitudes)
    stacked = search_scales([torch.cat([weight, other])], [SPEC], [hessian], magnitudes)
    assert torch.allclose(both.scales, stacked.scales, rtol=1e-5)
    assert both.after == pytest.approx(stacked.after, rel=1e-5)


def test_uniform_inputs_and_weights_need_no_scales() -> None:
    weight = torch.randn(4, 1).expand(4, 32).contiguous()
    found = search_scales([weight], [SPEC], [torch.eye(32)], torch.ones(32))
    assert (found.ratio, found.duo, found.after) == (0.0, False, found.before)
    assert torch.equal(found.scales, torch.ones(32))


def test_tied_channels_share_their_scales() -> None:
    weight, _, statistics = _layer()
    assert statistics.magnitudes is not None

    def tie(scales: Tensor) -> Tensor:
        return scales.view(2, 48).log().mean(0).exp().repeat(2)

    found = search_scales([weight], [SPEC], [_hessian(statistics)], statistics.magnitudes, tie=tie)
    assert torch.equal(found.scales[:48], found.scales[48:])
    assert found.after < found.before


def test_channels_that_nothing_reaches_keep_finite_scales() -> None:
    weight, inputs, _ = _layer()
    inputs[:, :5] = 0
    weight[:, 7] = 0
    collector = Collector(ActivationAware.needs)
    collector.add(inputs)
    statistics = collector.finish()
    assert statistics.magnitudes is not None
    found = search_scales([weight], [SPEC], [_hessian(statistics)], statistics.magnitudes)
    assert torch.isfinite(found.scales).all() and (found.scales > 0).all()


def test_without_inputs_a_weight_is_rounded_to_nearest() -> None:
    weight, _, statistics = _layer()
    plain = RoundToNearest().quantize(weight, SPEC)
    assert ActivationAware().calibrated(weight, SPEC, Statistics()).equal(plain)
    assert ActivationAware().quantize(weight, SPEC).equal(plain)
    assert ActivationAware(clip=False).calibrated(weight, SPEC, statistics).equal(plain)
    symmetric = ActivationAware(symmetric=True).calibrated(weight, SPEC, Statistics())
    assert symmetric.equal(RoundToNearest(symmetric=True).quantize(weight, SPEC))


def test_zeros_stay_zero() -> None:
    _, _, statistics = _layer()
    assert not ActivationAware().calibrated(torch.zeros(4, 96), SPEC, statistics).dequantize().any()


def test_what_cannot_be_searched_is_refused() -> None:
    weight, _, statistics = _layer()
    for grouping in (Grouping.flat_blocks(32), Grouping.per_tensor(), Grouping.groups(32, permuted=True)):
        assert not ActivationAware().supports(replace(SPEC, grouping=grouping))
        with pytest.raises(PlanError, match="in groups along the inputs"):
            ActivationAware().calibrated(weight, replace(SPEC, grouping=grouping), statistics)
    with pytest.raises(PlanError, match=r"Hessian of 96 x 96 is needed for the clip search, not \[4, 4\]"):
        ActivationAware().calibrated(weight, SPEC, Statistics(1, hessian=torch.eye(4)))
    with pytest.raises(PlanError, match="finite Hessian"):
        ActivationAware().calibrated(weight, SPEC, Statistics(1, hessian=torch.full((96, 96), torch.nan)))
    with pytest.raises(PlanError, match="NaN or infinite"):
        ActivationAware().calibrated(weight / 0, SPEC, statistics)
    with pytest.raises(PlanError, match="finite magnitudes"):
        search_scales([weight], [SPEC], [torch.eye(96)], torch.full((96,), torch.inf))
