"""How long GPTQ's solver takes for one transformer block: ``python benchmarks/gptq_solver.py [--shape llama-7b]``.

Weights are random, inputs are correlated random numbers; the time depends on neither. Linears with the same inputs are
solved together, as the runner does. Gathering the statistics and running the model are not part of it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from lowbit.algorithms import integer_spec
from lowbit.algorithms.factor import factorize
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.statistics import Statistics

# By shape, what one block has: rows of the linears that share their inputs, and how many inputs.
SHAPES: dict[str, list[tuple[list[int], int]]] = {
    "opt-350m": [([1024] * 3, 1024), ([1024], 1024), ([4096], 1024), ([1024], 4096)],
    "llama-7b": [([4096] * 3, 4096), ([4096], 4096), ([11008] * 2, 4096), ([4096], 11008)],
    "opt-175b": [([12288] * 3, 12288), ([12288], 12288), ([49152], 12288), ([12288], 49152)],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"scale_search": "minmax"},
    "searched": {"sweeps": 0},
    "default": {},
    "best": {"scale_search": "trial", "desc_act": True, "sweeps": 4},
}


def statistics_of(size: int, device: torch.device) -> Statistics:
    generator = torch.Generator(device).manual_seed(size)
    inputs = torch.randn(2 * size, size, generator=generator, device=device)
    inputs = inputs * torch.rand(size, generator=generator, device=device) + inputs.roll(1, 1) * 0.5
    return Statistics(len(inputs), inputs.t() @ inputs / len(inputs))


def timed(device: torch.device, work: Any) -> tuple[float, Any]:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    made = work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, made


def measure(shape: str, device: torch.device, solvers: dict[str, Gptq]) -> dict[str, Any]:
    stages: list[dict[str, Any]] = []
    for rows, size in SHAPES[shape]:
        statistics = statistics_of(size, device)
        weights = [torch.randn(count, size, device=device, dtype=torch.bfloat16) * 0.02 for count in rows]
        hessian = statistics.hessian
        stage: dict[str, Any] = {"rows": sum(rows), "inputs": size}
        stage["factor"] = timed(device, lambda hessian=hessian: factorize(hessian, 0.01))[0]
        for name, solver in solvers.items():
            specs = [integer_spec(4, 128)] * len(weights)
            stage[name], made = timed(
                device, lambda s=solver, w=weights, p=specs, i=statistics: s.calibrated_many(w, p, i)
            )
            stage[f"{name} output error"] = made[0][1].output_error
        stages.append(stage)
    seconds = {name: sum(stage[name] for stage in stages) for name in ("factor", *solvers)}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    return {"shape": shape, "device": torch.cuda.get_device_name(device), "torch": torch.__version__,
            "stages": stages, "seconds": seconds, "peak_gib": peak}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    device = torch.device("cuda")
    # The first kernels of a process, and its first graph, take longer.
    Gptq().calibrated(torch.randn(256, 512, device=device), integer_spec(4, 128), statistics_of(512, device))
    solvers = {name: Gptq(**SETTINGS[name]) for name in arguments.settings}
    first = measure(arguments.shape, device, solvers)
    again = measure(arguments.shape, device, solvers)  # as every block but the first, whose graphs are captured by then
    print(json.dumps({"first": first, "again": again}, indent=1))


if __name__ == "__main__":
    main()
