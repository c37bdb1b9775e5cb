"""Perplexity of calibrated quantization on a real model, with the time that it took: a row per method, seed and width.

    python benchmarks/calibrated.py MODEL --calib calib.txt --text wikitext2_test.txt --rows best gptq --seeds 0 1 2

Every row is quantized as ``lowbit quantize`` does, written to a folder, loaded from it and measured over the text.
Bits per weight are counted from the tensors in the files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import lowbit
from lowbit.algorithms.gptq import Gptq
from lowbit.bench.perplexity import perplexity, token_windows
from lowbit.calibration.data import Calibration, DataConfig, load_calibration
from lowbit.calibration.tune import SIGN_ROUND, TuneConfig
from lowbit.integrations.transformers import best
from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun, versions

Made = tuple[Any, Calibrated]
Row = Callable[[Path, Calibration, torch.device], Made]


def gptq(
    bits: int, size: int, *, symmetric: bool, permuted: bool = False, tune: TuneConfig | None = None, **how: Any
) -> Row:
    def make(source: Path, calibration: Calibration, device: torch.device) -> Made:
        algorithm = Gptq(symmetric=symmetric, **how)
        method = Calibrated(lambda name: algorithm, "gptq", permuted=permuted, tune=tune)
        return lowbit.GPTQConfig(bits, group_size=size, sym=symmetric, desc_act=permuted), method

    return make


def autoround(bits: int, size: int, *, symmetric: bool) -> Row:
    return gptq(bits, size, symmetric=symmetric, tune=SIGN_ROUND)


def chosen(target: float, **changes: Any) -> Row:
    learning = changes.pop("learning", best.LEARNING)

    def make(source: Path, calibration: Calibration, device: torch.device) -> Made:
        choice = best.choose(source, calibration, target, device, learning=learning, **changes)
        return choice.config, choice.method

    return make


def uniform(bits: int, size: int, learning: TuneConfig | None = best.LEARNING) -> Row:
    def make(source: Path, calibration: Calibration, device: torch.device) -> Made:
        return lowbit.GPTQConfig(bits, group_size=size, sym=False), best.method_for(learning)

    return make


ROWS: dict[str, Row] = {
    "gptq 4-bit g128 sym": gptq(4, 128, symmetric=True),
    "gptq 4-bit g128 sym, desc_act": gptq(4, 128, symmetric=True, permuted=True, desc_act=True),
    "gptq 4-bit g128 sym, paper": gptq(4, 128, symmetric=True, scale_search=False),
    "gptq 3-bit g128 sym": gptq(3, 128, symmetric=True),
    "gptq 2-bit g64 sym": gptq(2, 64, symmetric=True),
    "gptaq 4-bit g128 sym": gptq(4, 128, symmetric=True, correction=True),
    "gptaq 3-bit g128 sym": gptq(3, 128, symmetric=True, correction=True),
    "gptaq 2-bit g64 sym": gptq(2, 64, symmetric=True, correction=True),
    "autoround 4-bit g128 sym": autoround(4, 128, symmetric=True),
    "autoround 2-bit g64": autoround(2, 64, symmetric=False),
    "best 4.25": chosen(4.25),
    "best 3.25": chosen(3.25),
    "best 2.35": chosen(2.35),
    "best 4.25 without learning": chosen(4.25, learning=None),
    "best 3.25 without learning": chosen(3.25, learning=None),
    "best 2.35 without learning": chosen(2.35, learning=None),
    "uniform 4-bit g128, learned": uniform(4, 128),
    "uniform 3-bit g128, learned": uniform(3, 128),
    "uniform 2-bit g64, learned": uniform(2, 64),
    "uniform 4-bit g128, gptq": uniform(4, 128, None),
    "uniform 3-bit g128, gptq": uniform(3, 128, None),
    "uniform 2-bit g64, gptq": uniform(2, 64, None),
    "best 3.25, hidden states not compared": chosen(3.25, learning=replace(best.LEARNING, hidden_weight=0.0)),
    "best 2.35, hidden states not compared": chosen(2.35, learning=replace(best.LEARNING, hidden_weight=0.0)),
}


def stored_bits(folder: Path) -> float:
    """Bits per quantized weight, counted from the files: everything of a quantized layer but its bias."""
    checkpoint = lowbit.open_checkpoint(folder)
    modules = set(checkpoint.weights)
    endings = [f".{suffix}" for suffix in checkpoint.wire.suffixes]
    total = 0
    for name in checkpoint.files.names():
        if name.rpartition(".")[0] in modules and name.endswith(tuple(endings)):
            tensor = checkpoint.files.tensor(name)
            total += 8 * tensor.numel() * tensor.element_size()
    return total / sum(weight.shape[0] * weight.shape[1] for weight in checkpoint.weights.values())


def measure(folder: Path, windows: torch.Tensor, device: torch.device) -> float:
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": str(device)})
    for module in model.modules():
        if hasattr(module, "select_kernel"):
            module.select_kernel("torch")  # in fp32, which is what the figures of the originals are in
    return perplexity(model, windows, batch_size=8 if device.type == "cuda" else 1).value


def run_row(
    name: str, seed: int, options: argparse.Namespace, windows: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    data = DataConfig(samples=options.samples, length=options.length, seed=seed)
    calibration = load_calibration(str(options.calib), tokenizer, data)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "made"
        target.mkdir()
        started = time.perf_counter()
        config, method = ROWS[name](options.model, calibration, device)
        run = CalibratedRun(options.model, config, method, calibration, Path(scratch) / "job", device)
        run.run()
        run.write(target)
        run.close()
        seconds = time.perf_counter() - started
        bits = stored_bits(target)
        value = measure(target, windows, device)
    return {
        "row": name,
        "seed": seed,
        "bits_per_weight": round(bits, 4),
        "perplexity": round(value, 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="beginnings of rows' names")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    windows = token_windows(tokenizer, options.text.read_text(encoding="utf-8"), options.length)[: options.windows]
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {"device": named, "versions": versions(), "date": time.strftime("%Y-%m-%d"), "windows": len(windows)}
    facts |= {"samples": options.samples, "length": options.length}
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in [name for name in ROWS if name.startswith(tuple(options.rows))]:
            if time.perf_counter() > options.until:
                break
            rows.append(run_row(name, seed, options, windows, device))
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
