"""One small checkpoint of every kind that every wire can write, made of random numbers; grows with the wires."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.core import (
    FloatCode,
    Grouping,
    IntCode,
    QuantSpec,
    QuantTensor,
    Scale,
    VectorCode,
    Zero,
    int8_spec,
    integer_spec,
    table_spec,
)
from lowbit.errors import LowbitError
from lowbit.wire import Wire, wires

SHAPE = (64, 128)
MODULES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj")
MODEL = {
    "model_type": "llama",
    "hidden_size": SHAPE[1],
    "intermediate_size": SHAPE[0],
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 16,
}
# Wires of files of their own, which have their own tests.
ELSEWHERE = {"gguf"}

# What a spec alone doesn't say: configs of formats that nothing is converted to.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "aqlm": [
        {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 4}
    ],
    "fbgemm_fp8": [{"quant_method": "fbgemm_fp8"}],
}
_INT8 = QuantSpec(IntCode(8, signed=True), Scale(torch.bfloat16), Grouping.per_channel(), dtype=torch.bfloat16)
SPECS = (
    integer_spec(4, 32),
    integer_spec(4, 32, permuted=True),
    integer_spec(3, 64),
    integer_spec(2, -1),
    integer_spec(8, 64),
    QuantSpec(IntCode(4, signed=True), Scale(torch.bfloat16), Grouping.groups(32), dtype=torch.bfloat16),
    QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(64), Zero("float", dtype=torch.float16)),
    QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(64), Zero("additive", dtype=torch.float16)),
    _INT8,
    int8_spec(),
    table_spec("nf4"),
    table_spec("fp4", nested=True),
    QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(torch.float32), Grouping.per_channel(), dtype=torch.bfloat16),
    QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(torch.bfloat16), Grouping.per_tensor(), dtype=torch.bfloat16),
    QuantSpec(VectorCode(2, 8, 1, 8), Scale(torch.float16), Grouping.per_channel()),
)


class Sample:
    """A checkpoint in memory."""

    def __init__(
        self,
        wire: Wire[Any],
        spec: QuantSpec,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        metadata: dict[str, str],
    ) -> None:
        self.wire, self.spec, self.config, self.tensors, self.metadata = wire, spec, config, tensors, metadata

    def __repr__(self) -> str:
        return f"{self.wire.name}: {self.spec}"

    def save(self, folder: Path) -> Path:
        """Write it as a folder and return that."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**MODEL, "quantization_config": self.config}))
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt", **self.metadata})
        return folder


@functools.cache
def samples() -> tuple[Sample, ...]:
    """Of every wire but those of :data:`ELSEWHERE`."""
    found: dict[tuple[str, str], Sample] = {}
    for wire in (wire for wire in wires() if wire.name not in ELSEWHERE):
        for settings, spec in (*_settings(wire), *_configured(wire)):
            sample = _sample(wire, settings, spec)
            if sample is not None:
                found.setdefault((wire.name, str(spec)), sample)
    return tuple(found.values())


def _settings(wire: Wire[Any]) -> list[tuple[Any, QuantSpec]]:
    found = []
    for spec in SPECS:
        with contextlib.suppress(LowbitError):
            settings = wire.settings_for(spec)
            found.append((settings, wire.spelling(settings, spec)))
    return found


def _configured(wire: Wire[Any]) -> list[tuple[Any, QuantSpec]]:
    parsed = [wire.parse(config) for config in CONFIGS.get(wire.name, ())]
    return [(settings, wire.spec(settings)) for settings in parsed]


def _sample(wire: Wire[Any], settings: Any, spec: QuantSpec) -> Sample | None:
    tensor = random_tensor(spec)
    try:
        joined = wire.join(dict.fromkeys(MODULES, settings), ["lm_head"])
        packed = {module: wire.write(wire.of(joined, module), tensor) for module in MODULES}
    except LowbitError:
        return None
    dense = {"model.norm.weight": torch.ones(SHAPE[1]), "lm_head.weight": torch.randn(16, SHAPE[1])}
    stored = {f"{module}.{suffix}": value.clone() for module in MODULES for suffix, value in packed[module].items()}
    metadata = wire.metadata(joined, dict.fromkeys(MODULES, (tensor.spec, tensor.shape)), list(dense))
    return Sample(wire, spec, wire.config(joined), {**dense, **stored}, metadata)


def random_tensor(spec: QuantSpec, shape: tuple[int, int] = SHAPE) -> QuantTensor:
    """A weight of random numbers that are valid under a spec."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (size, dtype) in spec.tensors(shape).items():
        if name == "group_index":
            groups = spec.grouping.counts(shape)[-1]
            tensors[name] = (torch.randperm(shape[1], generator=generator) % groups).to(dtype)
        elif dtype.is_floating_point:
            tensors[name] = (torch.rand(size, generator=generator) + 0.25).to(dtype)
        else:
            limits = torch.iinfo(dtype)
            tensors[name] = torch.randint(limits.min, limits.max + 1, size, generator=generator).to(dtype)
    return QuantTensor(spec, tensors, shape).validate()
