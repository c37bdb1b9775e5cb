"""Calibrated runs that take a fraction of a second, and what they leave behind in a form that can be compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

import lowbit
from lowbit.algorithms.gptq import Gptq
from lowbit.calibration.data import Calibration
from lowbit.calibration.tune import TuneConfig
from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun

BLOCKS = 3
VOCABULARY = 128
WITHOUT_INPUTS = 127  # a token that calibration data doesn't have
TOKEN_OF_RARE_EXPERT = 5  # nor this
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of three blocks in bf16."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_moe(folder: Path, dead: int | None = None, rare: int | None = None) -> Path:
    """A random Mixtral of two blocks and four experts, two of which are used for each token.

    The router never picks `dead`, and `rare` only for one token.
    """
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    with torch.no_grad():
        # All tokens but one have the same large first feature: a router's weight of it decides.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[TOKEN_OF_RARE_EXPERT, 0] = -1.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, 0] = 0
            for expert in [one for one in (dead, rare) if one is not None]:
                layer.mlp.gate.weight[expert] = 0
                layer.mlp.gate.weight[expert, 0] = -10.0
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def samples(count: int = 8, length: int = 32, seed: int = 0) -> Calibration:
    """Random ids below `WITHOUT_INPUTS`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, WITHOUT_INPUTS, (count, length), generator=generator)
    return Calibration(list(ids), "random ids")


def gptq(damp_percent: float = 0.01, **changes: Any) -> Calibrated:
    """The paper's GPTQ, on two samples at a time."""
    algorithm = Gptq(damp_percent, scale_search="minmax")
    return Calibrated(**{"algorithm_of": lambda name: algorithm, "label": "gptq", "batch_tokens": 64, **changes})


LEARNING = TuneConfig(epochs=3, batch=4)
TUNING = TuneConfig(steps=3, batch=2, norm_rate=1e-2)


def open_run(
    source: Path, job: Path, method: Calibrated | None = None, data: Calibration | None = None, **config: Any
) -> CalibratedRun:
    """A run to 4 bits."""
    settings = lowbit.GPTQConfig(**{"bits": 4, "group_size": 32, **config})
    return CalibratedRun(source, settings, method or gptq(), data or samples(), job, torch.device("cpu"))


def finish(run: CalibratedRun, out: Path) -> dict[str, Any]:
    """Run to the end, write, and say what was written."""
    try:
        run.run()
        out.mkdir(parents=True)
        run.write(out)
    finally:
        run.close()
    return contents(out)


def contents(folder: Path) -> dict[str, Any]:
    """Digests of all tensors, and every JSON file, without the times in it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            found[path.name] = _timeless(json.loads(path.read_text()))
            continue
        with safe_open(str(path), framework="pt") as file:
            found[path.name] = file.metadata()
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[f"{path.name}::{name}"] = [str(tensor.dtype), *tensor.shape, hashlib.sha256(raw).hexdigest()]
    return found


def report_of(folder: Path) -> dict[str, Any]:
    """``quantization_report.json``."""
    return dict(json.loads((folder / "quantization_report.json").read_text()))


def tensors_of(folder: Path) -> dict[str, Any]:
    """The part of :func:`contents` that is of tensors."""
    return {name: value for name, value in contents(folder).items() if "::" in name}


def _timeless(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _timeless(value) for key, value in data.items() if key != "seconds"}
    return [_timeless(entry) for entry in data] if isinstance(data, list) else data
