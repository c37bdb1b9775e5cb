"""Where SignRound starts: GPTQ with correction on fine grids, the nearest codes on coarse ones."""

from __future__ import annotations

import torch

from lowbit.algorithms import integer_spec
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.signround import SignRoundStart
from lowbit.algorithms.statistics import Collector, Statistics


def known(size: int) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, size, generator=generator) @ torch.randn(size, size, generator=generator)
    collector = Collector(SignRoundStart().needs)
    collector.add(inputs, inputs + 0.1 * torch.randn(256, size, generator=generator))
    return collector.finish()


def test_fine_grids_start_from_gptq_and_coarse_ones_from_the_nearest_codes() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    statistics, start = known(64), SignRoundStart()
    fine, coarse = integer_spec(4, group_size=32), integer_spec(2, group_size=32)
    expected = {
        fine: Gptq(correction=True).calibrated(weight, fine, statistics),
        coarse: Gptq().quantize(weight, coarse),
    }
    alone = {spec: start.calibrated(weight, spec, statistics) for spec in (fine, coarse)}
    together = start.calibrated_many([weight, weight], [fine, coarse], statistics)
    for (made, report), spec in zip(together, (fine, coarse), strict=True):
        for name, tensor in expected[spec].tensors.items():
            assert torch.equal(tensor, made.tensors[name]) and torch.equal(tensor, alone[spec].tensors[name])
        assert not report.notes and not report.fallback
    assert not torch.equal(expected[fine].tensors["codes"], Gptq().quantize(weight, fine).tensors["codes"])


def test_the_report_weighs_errors_by_the_inputs() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    statistics, spec = known(64), integer_spec(2, group_size=32)
    ((made, report),) = SignRoundStart().calibrated_many([weight], [spec], statistics)
    error, hessian = weight - made.dequantize(), statistics.hessian
    assert hessian is not None
    output = float((error @ hessian * error).sum() / (weight @ hessian * weight).sum())
    assert abs(report.output_error - output) < 1e-5 * output
    assert abs(report.weight_error - float(error.square().sum() / weight.square().sum())) < 1e-6
