"""Time the triton-wna16 kernel against torch's 16-bit linear and torch's own int4 kernel, batch by batch.

    python benchmarks/wna16_decode.py [--rows 1 2 4 8 16] [--repeats 15] [--output FILE]

Every candidate runs in a CUDA graph over enough copies of its weight that none is still in the second-level cache when
its turn comes again; a time is the median over the replays, divided by the copies. Before it is timed, each result is
compared with the dequantized weight times the inputs in fp32. The bandwidth floor is the bytes that a call must move
over the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from lowbit.core import Grouping, IntCode, QuantSpec, Scale, Zero
from lowbit.kernels import Problem, kernel_named, ops, select

ROTATED = 260_000_000  # bytes of weight copies, several times the second-level cache
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
DTYPES = [torch.float16, torch.bfloat16]
LIMIT = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}  # of the relative error; gross errors only, the tests have the bounds
DEVICE = torch.device("cuda", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = read_bandwidth()
    records = []
    for shape, grouping, dtype in problems():
        for record in measure(shape, grouping, dtype, arguments.rows, arguments.repeats):
            record["floor_us"] = round(record["bytes"] / bandwidth * 1e6, 2)
            print("{kernel:15s} {out:6d} x {in:<6d} {groups:24s} {dtype:9s} rows {rows:<4d} {us:8.2f} us"
                  "  floor {floor_us:7.2f}  error {error:.1e}".format(**record), flush=True)  # fmt: skip
            records.append(record)
    report = environment() | {"read_bandwidth_GBps": round(bandwidth / 1e9), "rotated_bytes": ROTATED, "times": records}
    output = arguments.output or Path(__file__).parent / "results" / f"wna16_decode_{device_slug()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(report | {"times": []}, indent=1).removesuffix("[]\n}")
    output.write_text(head + "[\n  " + ",\n  ".join(map(json.dumps, records)) + "\n ]\n}\n")


def problems() -> Iterator[tuple[tuple[int, int], Grouping, torch.dtype]]:
    for shape in SHAPES:
        for dtype in DTYPES:
            yield shape, Grouping.groups(128), dtype
    for grouping in (*map(Grouping.groups, (64, 32, 16)), Grouping.per_channel(), Grouping.groups(128, permuted=True)):
        yield SHAPES[0], grouping, torch.float16


def measure(
    shape: tuple[int, int], grouping: Grouping, dtype: torch.dtype, batches: list[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Records of all kernels on one weight."""
    spec = QuantSpec(IntCode(4), Scale(torch.float16), grouping, Zero("integer", 4))
    kernel = select(Problem(spec, shape, "cuda", dtype)).name
    weights = packed_copies(spec, shape, kernel)
    denses = dense_copies(shape, dtype)
    for rows in batches:
        inputs = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
        common = {"out": shape[0], "in": shape[1], "groups": str(grouping), "dtype": str(dtype)[6:], "rows": rows}
        moved = inputs.nbytes + rows * shape[0] * dtype.itemsize

        def linear(weight: list[Tensor], inputs: Tensor = inputs) -> Tensor:
            return ops.linear(inputs, weight, None, spec.to_json(), kernel, shape[0])

        dense = ops.dequantize(weights[0], spec.to_json(), kernel, *shape, torch.float32)
        error = relative_error(linear(weights[0]), inputs, dense)
        record = {
            "kernel": kernel,
            **common,
            "bytes": sum(tensor.nbytes for tensor in weights[0]) + moved,
            "error": error,
        }
        yield record | timed(linear, weights, repeats) | {"host_us": host_time(lambda: linear(weights[0]))}

        def multiply(weight: Tensor, inputs: Tensor = inputs) -> Tensor:
            return functional.linear(inputs, weight)

        error = relative_error(multiply(denses[0]), inputs, denses[0].float())
        record = {"kernel": "torch 16-bit", **common, "bytes": denses[0].nbytes + moved, "error": error}
        yield record | timed(multiply, denses, repeats) | {"host_us": host_time(lambda: multiply(denses[0]))}
        if dtype == torch.bfloat16 and grouping == Grouping.groups(128):
            yield tinygemm(shape, inputs, common, moved, repeats)


def tinygemm(
    shape: tuple[int, int], inputs: Tensor, common: dict[str, Any], moved: int, repeats: int
) -> dict[str, Any]:
    """torch's int4 kernel: bf16, ``w = (q - 8) * scale + zero``."""
    copies = count(shape[0] * shape[1] // 2)
    codes = torch.randint(0, 16, shape, device=DEVICE, dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scales = torch.rand(shape[1] // 128, shape[0], 2, device=DEVICE).mul_(0.01).add_(0.005).bfloat16()
    weights = [(packed.clone(), scales.clone()) for _ in range(copies)]

    def multiply(weight: tuple[Tensor, Tensor]) -> Tensor:
        result: Tensor = torch.ops.aten._weight_int4pack_mm(inputs, weight[0], 128, weight[1])
        return result

    wide = scales.float().permute(1, 0, 2).repeat_interleave(128, dim=1)
    dense = (codes.float() - 8) * wide[..., 0] + wide[..., 1]
    error = relative_error(multiply(weights[0]), inputs, dense)
    record = {"kernel": "torch tinygemm", **common, "bytes": packed.nbytes + scales.nbytes + moved, "error": error}
    return record | timed(multiply, weights, repeats) | {"host_us": host_time(lambda: multiply(weights[0]))}


def packed_copies(spec: QuantSpec, shape: tuple[int, int], kernel: str) -> list[list[Tensor]]:
    """Random weights in the layout of a kernel."""
    layout = kernel_named(kernel).layout(spec, shape)
    return [
        [random_tensor(name, *declared) for name, declared in layout.items()]
        for _ in range(count(shape[0] * shape[1] // 2))
    ]


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if name == "columns":
        return torch.randperm(shape[-1], device=DEVICE).to(dtype).view(shape)
    if name == "zeros":
        return torch.randint(0, 16, shape, device=DEVICE, dtype=dtype)
    if dtype.is_floating_point:
        return torch.rand(shape, device=DEVICE).mul_(0.01).add_(0.005).to(dtype)
    return torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, shape, device=DEVICE, dtype=dtype)


def dense_copies(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(count(2 * shape[0] * shape[1]))]


def count(size: int) -> int:
    return max(2, -(-ROTATED // size))


def relative_error(outputs: Tensor, inputs: Tensor, dense: Tensor) -> float:
    """Against fp32.

    Raises:
        ValueError: the result is wrong.
    """
    expected = inputs.float() @ dense.T
    error = ((outputs.float() - expected).norm() / expected.norm()).item()
    if not error < LIMIT[outputs.dtype]:
        raise ValueError(f"a kernel is wrong: relative error {error:.2g}")
    return error


def timed(call: Callable[[Any], Tensor], weights: list[Any], repeats: int) -> dict[str, Any]:
    """Median, least and most microseconds of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(weights[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(weight) for weight in weights]
    times = []
    for replay in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1e3 / len(kept))
    return {"us": round(statistics.median(times), 2), "us_min": round(min(times), 2), "us_max": round(max(times), 2)}


def host_time(call: Callable[[], Tensor], calls: int = 200) -> float:
    """Microseconds that the host takes to launch one call eagerly."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return round(elapsed / calls * 1e6, 1)


def read_bandwidth() -> float:
    """Bytes per second at which a large buffer is read once."""
    buffers = [torch.ones(1 << 28, device=DEVICE, dtype=torch.float32) for _ in range(2)]
    result = timed(torch.sum, buffers, 15)
    return float(buffers[0].nbytes / result["us_min"] * 1e6)


def device_slug() -> str:
    return re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name(DEVICE).lower())


def environment() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(DEVICE),
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0],
    }


if __name__ == "__main__":
    main()
