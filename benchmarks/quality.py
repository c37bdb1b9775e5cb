"""Perplexity and bits per weight of everything that lowbit quantizes on the fly, on one model and one text.

    python benchmarks/quality.py MODEL TEXT [--seq-len 1024] [--windows N] [--device cuda] [--only NAME ...]
                                 [--output FILE]

Perplexity is that of :mod:`lowbit.bench.perplexity`; the model runs in fp32, so that what is measured is
the quantization and nothing else. Only the linear layers of the blocks are quantized. Besides the whole text, the
figure over its first 96 windows is given, for comparisons with measurements that stop there.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import lowbit
from lowbit.bench import bits_per_weight
from lowbit.bench.perplexity import perplexity, token_windows

FIRST = 96


def integers(bits: int, symmetric: bool, group_size: int = 128) -> Any:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    return lowbit.CompressedTensorsConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )


METHODS: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "bitsandbytes int8, threshold 6": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes nf4, nested": lambda: lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes fp4": lambda: lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "gptq 4 bits g128": lambda: lowbit.GPTQConfig(4, group_size=128, sym=False),
    "gptq 4 bits g128, symmetric": lambda: lowbit.GPTQConfig(4, group_size=128, sym=True),
    "gptq 3 bits g128": lambda: lowbit.GPTQConfig(3, group_size=128, sym=False),
    "gptq 2 bits g64": lambda: lowbit.GPTQConfig(2, group_size=64, sym=False),
    "compressed-tensors 5 bits g128": lambda: integers(5, False),
    "compressed-tensors NVFP4A16": lambda: lowbit.CompressedTensorsConfig(
        config_groups={"NVFP4A16": ["Linear"]}, ignore=["lm_head"]
    ),
    "compressed-tensors MXFP4A16": lambda: lowbit.CompressedTensorsConfig(
        config_groups={"MXFP4A16": ["Linear"]}, ignore=["lm_head"]
    ),
    "compressed-tensors FP8_DYNAMIC": lambda: lowbit.CompressedTensorsConfig(
        config_groups={"FP8_DYNAMIC": ["Linear"]}, ignore=["lm_head"]
    ),
    "hqq 8 bits g64": lambda: lowbit.HqqConfig(8, 64, skip_modules=["lm_head"]),
    "hqq 4 bits g64": lambda: lowbit.HqqConfig(4, 64, skip_modules=["lm_head"]),
    "hqq 4 bits g128": lambda: lowbit.HqqConfig(4, 128, skip_modules=["lm_head"]),
    "hqq 3 bits g64": lambda: lowbit.HqqConfig(3, 64, skip_modules=["lm_head"]),
    "hqq 2 bits g64": lambda: lowbit.HqqConfig(2, 64, skip_modules=["lm_head"]),
    "quanto int8": lambda: lowbit.QuantoConfig("int8"),
    "quanto int4": lambda: lowbit.QuantoConfig("int4"),
    "quanto int2": lambda: lowbit.QuantoConfig("int2"),
    "quanto float8": lambda: lowbit.QuantoConfig("float8"),
    "torchao int8": lambda: lowbit.TorchAoConfig("int8_weight_only"),
    "torchao int8, int8 activations": lambda: lowbit.TorchAoConfig("int8_dynamic_activation_int8_weight"),
    "torchao int4 g32": lambda: lowbit.TorchAoConfig("int4_weight_only", group_size=32),
    "eetq int8": lambda: lowbit.EetqConfig("int8"),
    "fbgemm_fp8": lowbit.FbgemmFp8Config,
    **{
        f"gguf {name}": (
            lambda name=name: lowbit.GgufConfig(type=name, modules_to_not_convert=["lm_head", "embed_tokens"])
        )
        for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
    },
}


def measure(name: str, model_folder: str, windows: torch.Tensor, device: str) -> dict[str, Any]:
    config = METHODS[name]()
    extra = {} if config is None else {"quantization_config": config}
    begin = time.perf_counter()
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, device_map=device, **extra
    ).eval()
    loaded = time.perf_counter() - begin
    head = perplexity(model, windows[:FIRST], batch_size=1)
    rest = perplexity(model, windows[FIRST:], batch_size=1) if len(windows) > FIRST else None
    total = head.nll + (rest.nll if rest else 0.0), head.tokens + (rest.tokens if rest else 0)
    return {
        "bits_per_weight": round(bits_per_weight(model), 4) if config is not None else 16.0,
        "perplexity": round(math.exp(total[0] / total[1]), 4),
        f"perplexity_of_{min(FIRST, len(windows))}_windows": round(head.value, 4),
        "seconds_to_load_and_quantize": round(loaded, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    windows = token_windows(tokenizer, options.text.read_text(encoding="utf-8"), options.seq_len)[: options.windows]
    rows = {}
    for name in options.only:
        try:
            rows[name] = measure(name, options.model, windows, options.device)
        except Exception as error:  # noqa: BLE001  one method that fails is a line of the table
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(f"{name:36} {rows[name]}", flush=True)
    report = {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "versions": {
            "lowbit": lowbit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "windows": len(windows),
        "seq_len": options.seq_len,
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
