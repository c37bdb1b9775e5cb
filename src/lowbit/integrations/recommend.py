"""Which quantization of a model fits a memory, by the best quality first; from its configuration, without weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from lowbit.core import Plan
from lowbit.errors import LowbitError, PlanError
from lowbit.integrations.transformers.methods import METHODS
from lowbit.integrations.transformers.quantizer import LowbitQuantizer
from lowbit.kernels import Problem, explain

# What a process needs before it holds any weight: torch's libraries and buffers, a CUDA context and its kernels.
RUNTIME_BYTES: Final = 500 * 2**20
_GIB: Final = 2**30
_BAD: Final = 25.0  # percent; from here on a smaller model is likely better


@dataclass(frozen=True)
class Candidate:
    """A way to quantize, and what it costs in quality.

    Attributes:
        title: for people.
        method: the quantization method, as configs call it; empty for none.
        arguments: of the method's config class.
        options: of ``lowbit quantize``; empty where only the config says it.
        perplexity: how much it grows, in percent; measured on WikiText-2 with a model of 29M parameters, see
            ``docs/quality.md``. Larger models lose less, in the same order.
    """

    title: str
    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    options: str = ""
    perplexity: float = 0.0


def _gguf(kind: str, cost: float) -> Candidate:
    return Candidate(f"GGUF {kind}", "gguf", {"type": kind}, "", cost)


def _hqq(bits: int, group_size: int, cost: float) -> Candidate:
    options = f"--method hqq --bits {bits} --group-size {group_size}"
    arguments = {"nbits": bits, "group_size": group_size}
    return Candidate(f"HQQ, {bits} bits, groups of {group_size}", "hqq", arguments, options, cost)


def _rtn(bits: int, group_size: int, cost: float) -> Candidate:
    options = f"--method rtn --bits {bits} --group-size {group_size}"
    title = f"round-to-nearest in GPTQ's format, {bits} bits, groups of {group_size}"
    return Candidate(title, "gptq", {"bits": bits, "group_size": group_size, "sym": False}, options, cost)


# In the order of what they cost; docs/quality.md holds the same numbers.
CANDIDATES: Final = (
    Candidate("no quantization", ""),
    Candidate("quanto, 8 bits", "quanto", {"weights": "int8"}, "--method rtn --format quanto --bits 8", 0.02),
    _gguf("Q8_0", 0.04),
    Candidate("LLM.int8()", "bitsandbytes", {"load_in_8bit": True}, "--method int8", 0.06),
    _gguf("Q6_K", 0.09),
    _gguf("Q5_K_M", 0.17),
    _gguf("Q4_K_M", 1.6),
    _gguf("IQ4_XS", 2.4),
    _gguf("Q4_0", 2.7),
    Candidate(
        "NF4, blocks of 64, double quantization",
        "bitsandbytes",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "--method nf4 --double-quant",
        2.9,
    ),
    _hqq(4, 64, 2.95),
    _hqq(4, 128, 3.7),
    Candidate("quanto, 4 bits", "quanto", {"weights": "int4"}, "--method rtn --format quanto --bits 4", 3.8),
    _rtn(4, 128, 4.2),
    Candidate(
        "round-to-nearest in AWQ's format, 4 bits, groups of 128",
        "awq",
        {"bits": 4, "group_size": 128},
        "--method rtn --format awq --bits 4 --group-size 128",
        4.2,
    ),
    _gguf("Q3_K_M", 5.5),
    _hqq(3, 64, 16.5),
    _rtn(3, 128, 26.2),
    _gguf("Q2_K", 28.1),
    _hqq(2, 64, 314.0),
    _rtn(2, 64, 378.0),
)


@dataclass(frozen=True)
class Need:
    """What running a model takes, in bytes.

    Attributes:
        weights: all of them, quantized or not.
        cache: keys and values of the context.
        work: activations, the dense copy of one weight where the kernel makes one, and the process itself.
    """

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("cache", self.cache), ("at work", self.work))
        return f"{gib(self.total)}: " + " + ".join(f"{gib(size)} {name}" for name, size in parts)


@dataclass(frozen=True)
class Option:
    """A candidate on this model and device.

    Attributes:
        bits_per_weight: of the quantized layers, scales and zeros included; of all weights where none is.
        kernel: what runs most of the quantized weights.
    """

    candidate: Candidate
    need: Need
    bits_per_weight: float
    kernel: str

    def config(self) -> str:
        """The config as Python code; empty without quantization."""
        if not self.candidate.method:
            return ""
        name = METHODS[self.candidate.method].config_class.__name__
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.candidate.arguments.items())
        return f"lowbit.{name}({arguments})"


@dataclass(frozen=True)
class Recommendation:
    """What fits, best quality first, and what doesn't."""

    memory: int
    fitting: tuple[Option, ...]
    too_large: tuple[Option, ...]

    @property
    def choice(self) -> Option:
        """The best that fits.

        Raises:
            PlanError: nothing does; says what the smallest would need.
        """
        if self.fitting:
            return self.fitting[0]
        least = min(self.too_large, key=lambda option: option.need.total)
        raise PlanError(
            f"nothing fits into {gib(self.memory)}; the smallest, {least.candidate.title}, needs {least.need}"
        )

    def reasons(self) -> list[str]:
        """Why the choice is what it is."""
        choice, cost = self.choice, self.choice.candidate.perplexity
        better = [option for option in self.too_large if option.candidate.perplexity < cost]
        reasons = [f"it needs {choice.need}, of {gib(self.memory)}"]
        if better:
            reasons.append(f"the next better one, {better[-1].candidate.title}, needs {gib(better[-1].need.total)}")
        if cost:
            reasons.append(f"perplexity grew by {cost:g} % where it was measured, a model of 29M parameters")
        if cost > _BAD:
            reasons.append("that is much: a smaller model in more bits is likely better")
        if choice.kernel:
            reasons.append(f"most of its weights run on the kernel {choice.kernel}")
        return reasons


def gib(size: int) -> str:
    """Bytes as text; rounded up, so that what is said to be needed is enough."""
    return f"{math.ceil(100 * size / _GIB) / 100:.2f} GiB"


def recommend(config: Any, *, device: str, memory: int, context: int = 4096) -> Recommendation:
    """Go through the candidates for a causal language model.

    Args:
        config: the model's Transformers configuration.
        device: type of the device, ``cpu``, ``cuda``, ...; it need not be there.
        memory: bytes that may be used.
        context: tokens of prompt and answer together, of one sequence.

    Raises:
        PlanError: Transformers has no such causal language model.
    """
    model, dtype = _on_meta(config)
    cache = cache_bytes(config, context, dtype)
    options = [
        option
        for candidate in CANDIDATES
        if (option := _option(candidate, model, dtype, device, cache, context)) is not None
    ]
    return Recommendation(
        memory,
        tuple(option for option in options if option.need.total <= memory),
        tuple(option for option in options if option.need.total > memory),
    )


def _on_meta(config: Any) -> tuple[Any, torch.dtype]:
    import transformers

    dtype = config.get_text_config(decoder=True).dtype or torch.float16
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, ImportError, AttributeError) as error:
        raise PlanError(f"Transformers has no causal language model for this configuration: {error}") from error
    return model, dtype


def _option(
    candidate: Candidate, model: nn.Module, dtype: torch.dtype, device: str, cache: int, context: int
) -> Option | None:
    """None where the method isn't there, or nothing in this model could be quantized so."""
    plan = Plan({})
    if candidate.method:
        if candidate.method not in METHODS:
            return None
        try:
            plan = _plan(candidate, model, dtype)
        except LowbitError:
            return None
    packed, weights = packed_bytes(plan), sum(_dense_sizes(model, plan).values())
    count = sum(math.prod(shape) for name, shape in plan.shapes.items() if name in plan.quantized)
    kernel, dense_copy = _kernel(plan, dtype, device)
    everything = sum(parameter.numel() for parameter in model.parameters())
    bits = 8 * packed / count if count else 8 * weights / everything
    work = RUNTIME_BYTES + dense_copy + activation_bytes(model, context, dtype)
    return Option(candidate, Need(packed + weights, cache, work), bits, kernel)


def _plan(candidate: Candidate, model: nn.Module, dtype: torch.dtype) -> Plan:
    """The very plan that loading makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = METHODS[candidate.method].config_class(**candidate.arguments)
        quantizer = LowbitQuantizer(config, pre_quantized=False)
        quantizer._process_model_before_weight_loading(model, dtype=dtype)
    return quantizer.plan or Plan({})


def packed_bytes(plan: Plan) -> int:
    """Bytes of a plan's quantized weights, as :meth:`QuantSpec.tensors` lays them out; experts count one by one."""
    total = 0
    for name, spec in plan.quantized.items():
        *many, rows, cols = plan.shapes[name]
        layout = spec.tensors((rows, cols)).values()
        total += math.prod(many) * sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)
    return total


def _dense_sizes(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Bytes of everything that isn't quantized, tied tensors once."""
    sizes = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in tied and name not in plan.quantized and name.removesuffix(".weight") not in plan.quantized:
            sizes[name] = tensor.numel() * tensor.element_size()
    return sizes


def _kernel(plan: Plan, dtype: torch.dtype, device: str) -> tuple[str, int]:
    """The kernel of most weights, and the bytes of the largest weight that is made dense while it runs."""
    counts: dict[str, int] = {}
    largest = 0
    for name, spec in plan.quantized.items():
        rows, cols = plan.shapes[name][-2:]
        kernel = next(found for found, reason in explain(Problem(spec, (rows, cols), device, dtype)) if reason is None)
        counts[kernel] = counts.get(kernel, 0) + math.prod(plan.shapes[name])
        if kernel == "torch":
            # fp32 while it is made, then once more in the dtype of the product.
            largest = max(largest, rows * cols * (4 + dtype.itemsize))
    return max(counts, key=lambda kernel: counts[kernel], default=""), largest


def cache_bytes(config: Any, context: int, dtype: torch.dtype) -> int:
    """Keys and values of one sequence of `context` tokens; a sliding window holds no more than its length."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0) or 0
    kept = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    layers = getattr(text, "num_hidden_layers", 0) or 0
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None) or context
    tokens = {"full_attention": context, "sliding_attention": min(window, context)}
    return sum(2 * kept * size * tokens.get(kind, 0) for kind in kinds) * dtype.itemsize


def activation_bytes(model: Any, context: int, dtype: torch.dtype) -> int:
    """A generous guess for the activations of a prompt of `context` tokens in one go, without attention matrices."""
    text = model.config.get_text_config(decoder=True)
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list) else inner
    return context * (6 * hidden + 3 * inner) * max(dtype.itemsize, 2) + 4 * text.vocab_size


def describe(option: Option, model: str) -> dict[str, Any]:
    """An option as JSON: numbers, and what to type."""
    candidate, need = option.candidate, option.need
    command = f"lowbit quantize {model} OUT {candidate.options}" if candidate.options else ""
    if candidate.method == "gguf":
        command = f"lowbit convert {model} OUT.gguf --to gguf:{candidate.arguments['type']}"
    return {
        "title": candidate.title,
        "method": candidate.method or None,
        "arguments": candidate.arguments,
        "bits_per_weight": round(option.bits_per_weight, 3),
        "perplexity_increase_percent": candidate.perplexity,
        "weights_bytes": need.weights,
        "cache_bytes": need.cache,
        "work_bytes": need.work,
        "total_bytes": need.total,
        "kernel": option.kernel or None,
        "command": command or None,
        "config": option.config() or None,
    }
