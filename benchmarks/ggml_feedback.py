"""How much error feedback lowers the error of a layer's outputs in ggml's types, against importance alone.

    python benchmarks/ggml_feedback.py MODEL TEXT --out benchmarks/results/ggml_feedback_base.json

Per layer and type: ``tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ)``, with H from the first windows of 1024 tokens of the text,
and the processor time that it took, in seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.algorithms import Algorithm, ErrorFeedbackBlocks, GgmlBlocks
from lowbit.algorithms.statistics import Collector, Statistics
from lowbit.core.ggml import GGML_SPECS

LAYERS = "layers.1.self_attn.o_proj,layers.3.self_attn.q_proj,layers.3.mlp.down_proj"
TYPES = "Q2_K,Q3_K,Q4_K,IQ4_XS,IQ2_XS,IQ3_XXS,IQ3_S"
WINDOW = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", default=LAYERS, help="ends of modules' names")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    layers = gathered(arguments)
    rows = [
        measured(name, weight, statistics, kind)
        for name, (weight, statistics) in layers.items()
        for kind in arguments.types.split(",")
    ]
    result = {"model": arguments.model.name, "windows": arguments.windows, "torch": torch.__version__, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def gathered(arguments: argparse.Namespace) -> dict[str, tuple[Tensor, Statistics]]:
    """Weights and the statistics of their inputs."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ends = tuple(arguments.layers.split(","))
    found = {name: module for name, module in model.named_modules() if name.endswith(ends)}
    collectors = {name: Collector(frozenset({"hessian"})) for name in found}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, inputs: collectors[name].add(inputs[0]))

    for name, module in found.items():
        watch(name, module)
    text = arguments.text.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        for window in tokens.split(WINDOW)[: arguments.windows]:
            model(window.unsqueeze(0))
    return {name: (module.weight.detach(), collectors[name].finish()) for name, module in found.items()}


def measured(name: str, weight: Tensor, statistics: Statistics, kind: str) -> dict[str, object]:
    row: dict[str, object] = {"layer": name, "shape": list(weight.shape), "type": kind}
    algorithms: dict[str, Algorithm] = {
        "importance": GgmlBlocks(),
        "feedback": ErrorFeedbackBlocks(sweeps=0),
        "feedback_2_sweeps": ErrorFeedbackBlocks(sweeps=2),
    }
    hessian = statistics.hessian
    if hessian is None:
        raise SystemExit("no Hessian was gathered")
    for label, algorithm in algorithms.items():
        started = time.process_time()
        error = weight - algorithm.calibrated(weight, GGML_SPECS[kind], statistics).dequantize()
        row[f"{label}_seconds"] = round(time.process_time() - started, 2)
        row[label] = float(f"{float((error @ hessian * error).sum() / (weight @ hessian * weight).sum()):.4g}")
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
