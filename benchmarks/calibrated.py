"""Perplexity of calibrated quantization on a real model, with the time that it took: a row per method, seed and width.

    python benchmarks/calibrated.py MODEL --calib calib.txt --text wikitext2_test.txt --rows best gptq --seeds 0 1 2

Every row is quantized as ``lowbit quantize`` does, written to a folder, loaded from it and measured over the text; the
figure over the first 96 windows is there for comparisons with measurements that stop there. Bits per weight are counted
from the tensors in the files. With ``--processes N`` so many rows are worked on at a time, dealt out to the GPUs that
there are; their seconds then say little.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from lowbit.integrations.transformers.calibrated_methods import Settings, calibrated_method

FIRST = 96
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
    def make(source: Path, calibration: Calibration, device: torch.device) -> Made:
        config = lowbit.GPTQConfig(bits, group_size=size, sym=symmetric)
        return config, calibrated_method("autoround", Settings(symmetric=symmetric))

    return make


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


def awq(bits: int, size: int) -> Row:
    def make(source: Path, calibration: Calibration, device: torch.device) -> Made:
        config = lowbit.AwqConfig(bits, size) if bits == 4 else lowbit.GPTQConfig(bits, group_size=size, sym=False)
        return config, calibrated_method("awq", Settings())

    return make


def gguf(kind: str, *, feedback: bool) -> Row:
    """The blocks of the model; what llama.cpp does with the embedding has nothing to do with calibration."""

    def make(source: Path, calibration: Calibration, device: torch.device) -> Made:
        config = lowbit.GgufConfig(type=kind, modules_to_not_convert=["lm_head", "embed_tokens"])
        return config, calibrated_method("gguf", Settings(feedback=feedback))

    return make


def aqlm(codebooks: int, bits: int) -> Row:
    def make(source: Path, calibration: Calibration, device: torch.device) -> Made:
        config = lowbit.AqlmConfig(in_group_size=8, nbits_per_codebook=bits, num_codebooks=codebooks)
        return config, calibrated_method("aqlm", Settings())

    return make


GGUF = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_S", "Q2_K", "IQ2_XS")
ROWS: dict[str, Row] = {
    "gptq 4-bit g128 sym": gptq(4, 128, symmetric=True),
    "gptq 4-bit g128 sym, desc_act": gptq(4, 128, symmetric=True, permuted=True, desc_act=True),
    "gptq 4-bit g128 sym, paper": gptq(4, 128, symmetric=True, scale_search=False),
    "gptq 3-bit g128 sym": gptq(3, 128, symmetric=True),
    "gptq 2-bit g64 sym": gptq(2, 64, symmetric=True),
    "gptaq 4-bit g128 sym": gptq(4, 128, symmetric=True, correction=True),
    "gptaq 3-bit g128 sym": gptq(3, 128, symmetric=True, correction=True),
    "gptaq 2-bit g64 sym": gptq(2, 64, symmetric=True, correction=True),
    "awq 4-bit g128": awq(4, 128),
    "awq 3-bit g128": awq(3, 128),
    **{f"gguf {kind}, importance": gguf(kind, feedback=False) for kind in GGUF},
    **{f"gguf {kind}, error feedback": gguf(kind, feedback=True) for kind in GGUF},
    "aqlm 2x8": aqlm(2, 8),
    "aqlm 3x8": aqlm(3, 8),
    "autoround 4-bit g128 sym": autoround(4, 128, symmetric=True),
    "autoround 3-bit g128 sym": autoround(3, 128, symmetric=True),
    "autoround 2-bit g64": autoround(2, 64, symmetric=False),
    "autoround 4-bit g128 sym, from gptq": gptq(4, 128, symmetric=True, tune=SIGN_ROUND),
    "autoround 2-bit g64, from gptq": gptq(2, 64, symmetric=False, tune=SIGN_ROUND),
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


def measure(folder: Path, windows: torch.Tensor, device: torch.device) -> dict[str, float]:
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": str(device)})
    for module in model.modules():
        if hasattr(module, "select_kernel"):
            module.select_kernel("torch")  # in fp32, which is what the figures of the originals are in
    parts = [part for part in (windows[:FIRST], windows[FIRST:]) if len(part)]
    found = [perplexity(model, part, batch_size=8 if device.type == "cuda" else 1) for part in parts]
    whole = math.exp(sum(part.nll for part in found) / sum(part.tokens for part in found))
    return {"perplexity": round(whole, 4), f"perplexity_of_{len(parts[0])}_windows": round(found[0].value, 4)}


def run_row(name: str, seed: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
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
        row = {"row": name, "seed": seed, "format": config.to_dict()["quant_method"], "seconds": round(seconds, 1)}
        row["bits_per_weight"] = round(stored_bits(target), 4)
        return row | measure(target, test_windows(options), device)


def test_windows(options: argparse.Namespace) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    return token_windows(tokenizer, text, options.length)[: options.windows]


# ------------------------------------------------------------------------------------------------- several at a time

_place: list[torch.device] = []  # of this process


def take_place(numbers: Any, options: argparse.Namespace) -> None:
    """Of the GPUs that there are, one for each process in turn; of the cores, their share."""
    number = numbers.get()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    _place.append(device)


def run_in_process(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    if time.time() > options.deadline:
        return {"row": name, "seed": seed, "error": "not begun in time"}
    try:
        return run_row(name, seed, options, _place[0])
    except Exception as error:  # noqa: BLE001 - one row that fails is a line of the table
        return {"row": name, "seed": seed, "error": f"{type(error).__name__}: {error}"[:300]}


def results(wanted: list[tuple[str, int]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(options.processes):
        numbers.put(number)
    with ProcessPoolExecutor(options.processes, context, take_place, (numbers, options)) as pool:
        for future in as_completed([pool.submit(run_in_process, name, seed, options) for name, seed in wanted]):
            yield future.result()


def named_rows(wanted: list[str]) -> list[str]:
    """Rows by name, or by how their names begin, in the order that was asked for."""
    found = [row for text in wanted for row in ([text] if text in ROWS else ROWS) if row.startswith(text)]
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="rows' names, or how they begin")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="rows that are worked on at a time")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.deadline = time.time() + options.until
    device = torch.device(options.device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {"device": named, "versions": versions(), "date": time.strftime("%Y-%m-%d"), "processes": options.processes}
    facts |= {"windows": len(test_windows(options)), "samples": options.samples, "length": options.length}
    wanted = [(name, seed) for name in named_rows(options.rows) for seed in options.seeds]
    rows: list[dict[str, Any]] = []
    for row in results(wanted, options):
        rows.append(row)
        print(json.dumps(row), flush=True)
        ordered = sorted(rows, key=lambda row: (list(ROWS).index(row["row"]), row["seed"]))
        options.out.write_text(json.dumps({**facts, "rows": ordered}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
