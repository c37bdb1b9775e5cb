"""The main job on the model that comes with the package: quantize, save, load with plain Transformers, measure."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import lowbit
from lowbit.assets import sample_text, small_model
from lowbit.bench.decoding import generate
from lowbit.bench.memory import bits_per_weight, checkpoint_bytes
from lowbit.bench.perplexity import perplexity, token_windows
from lowbit.integrations.transformers import register, unregister
from lowbit.integrations.transformers.quantizer import LowbitQuantizer

MODEL = small_model()
PROMPT = "The town lies on the river and"
NEW_TOKENS = 16
# The model's own dtype is only how it is stored: what is measured should be the quantization and nothing else.
_DTYPE = torch.float32

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Method:
    """A way to quantize: its name in the table, and its quantization config (None keeps the model as it is)."""

    name: str
    config: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        bits_per_weight: of the linear layers that are quantized, counted from the tensors in memory.
        size_mb: of the saved weights, 10**6 bytes.
        change: of the perplexity against the dense model.
        tokens_per_second: when decoding one sequence.
        text: a greedy continuation of :data:`PROMPT`.
    """

    method: str
    bits_per_weight: float
    size_mb: float
    perplexity: float
    change: float
    tokens_per_second: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _gptq(bits: int, symmetric: bool = False) -> Callable[[], Any]:
    return lambda: lowbit.GPTQConfig(bits, group_size=128, sym=symmetric)


def _bitsandbytes(**settings: Any) -> Callable[[], Any]:
    return lambda: lowbit.BitsAndBytesConfig(**settings)


METHODS = (
    Method("dense, bf16"),
    Method("bitsandbytes int8", _bitsandbytes(load_in_8bit=True)),
    Method("gptq 8 bits", _gptq(8)),
    Method("fbgemm fp8", lambda: lowbit.FbgemmFp8Config(activation_scale_ub=1200.0)),
    Method("quanto int8", lambda: lowbit.QuantoConfig(weights="int8")),
    Method("bitsandbytes nf4", _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    Method(
        "bitsandbytes nf4, nested",
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    Method("bitsandbytes fp4", _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    Method("gptq 4 bits", _gptq(4)),
    Method("gptq 4 bits, symmetric", _gptq(4, symmetric=True)),
    Method("awq 4 bits", lambda: lowbit.AwqConfig(bits=4, group_size=128)),
    Method("hqq 4 bits", lambda: lowbit.HqqConfig(nbits=4, group_size=64)),
    Method("gguf Q4_K_M", lambda: lowbit.GgufConfig(type="Q4_K_M")),
    Method("gptq 3 bits", _gptq(3)),
    Method("gptq 2 bits", _gptq(2)),
)


def demo_windows(tokenizer: Any, limit: int | None = None) -> Tensor:
    """The embedded text in the windows that it was drawn in, ``int64 [windows, seq_len]``."""
    facts = json.loads(sample_text().with_suffix(".json").read_text(encoding="utf-8"))
    text = sample_text().read_bytes().decode("utf-8")
    return token_windows(tokenizer, text, facts["seq_len"])[:limit]


def run_demo(
    windows: Tensor, tokenizer: Any, methods: tuple[Method, ...] = METHODS, on_windows: Progress | None = None
) -> Iterator[Row]:
    """Measure every method, the first of which has to be the dense model; yields each row when it is there.

    Args:
        windows: see :func:`demo_windows`.
        tokenizer: the embedded model's.
        methods: what to compare.
        on_windows: called with the number of windows that have been evaluated.
    """
    baseline: float | None = None
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as folder, _registered():
        for number, method in enumerate(methods):
            row = _measure(method, Path(folder) / str(number), windows, tokenizer, baseline, on_windows)
            baseline = row.perplexity if baseline is None else baseline
            yield row


def _measure(
    method: Method, folder: Path, windows: Tensor, tokenizer: Any, baseline: float | None, on_windows: Progress | None
) -> Row:
    saved = _quantize(method, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=_DTYPE, device_map="cpu")
    measured = perplexity(model, windows, on_windows=on_windows).value
    generated = generate(model, tokenizer, PROMPT, NEW_TOKENS)
    bits = bits_per_weight(model)
    return Row(
        method=method.name,
        # A dense weight is stored in 16 bits, whatever it is computed in here.
        bits_per_weight=bits if method.config else 16.0,
        size_mb=checkpoint_bytes(saved) / 1e6,
        perplexity=measured,
        change=measured - (measured if baseline is None else baseline),
        tokens_per_second=generated.tokens_per_second,
        text=" ".join(generated.text.split()),
    )


def _quantize(method: Method, folder: Path) -> Path:
    """Quantize and save the embedded model; the folder that it is in."""
    if method.config is None:
        return MODEL
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=method.config(), dtype="auto", device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


@contextmanager
def _registered() -> Iterator[None]:
    """Our quantizers in Transformers for as long as it takes."""
    before = AUTO_QUANTIZER_MAPPING.get("gptq") is LowbitQuantizer
    register()
    try:
        yield
    finally:
        if not before:
            unregister()
