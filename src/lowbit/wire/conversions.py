"""Which formats hold which weights of which others to the bit, from specs alone; ``docs/conversions.md`` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from lowbit.core import QuantSpec
from lowbit.core.respell import conditions, whole_zeros, why_not, without_zeros
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire
from lowbit.wire.detect import wire_named
from lowbit.wire.gguf.types import GgmlType
from lowbit.wire.gguf.wire import GgufSettings
from lowbit.wire.torchao.config import stored_dtype

_MODULE: Final = "model.layers.0.self_attn.q_proj"
_SHAPE: Final = (4096, 4096)  # a shape that every format holds
_GROUPS_OF_32: Final = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}
_INT4: Final = {"weight_dtype": stored_dtype("int4"), "granularity": _GROUPS_OF_32}


def _torchao(name: str, **fields: Any) -> Json:
    return {"quant_type": {"default": {"_type": name, "_version": 2, "_data": fields}}}


def _preset(name: str) -> Json:
    return {"config_groups": {name: ["Linear"]}}


# What people have: a title, the wire, and a quantization_config (of GGUF the type). "Symmetric" says of GPTQ that
# every zero point is the middle of the range.
SOURCES: Final[tuple[tuple[str, str, Any], ...]] = (
    ("GPTQ, 4 bits, groups of 128, symmetric", "gptq", {"bits": 4, "group_size": 128, "sym": True}),
    ("GPTQ, 4 bits, groups of 128", "gptq", {"bits": 4, "group_size": 128, "sym": False}),
    ("GPTQ, 4 bits, groups of 32, symmetric", "gptq", {"bits": 4, "group_size": 32, "sym": True}),
    ("GPTQ, 3 bits, groups of 64", "gptq", {"bits": 3, "group_size": 64, "sym": False}),
    ("GPTQ, 8 bits, whole rows, symmetric", "gptq", {"bits": 8, "group_size": -1, "sym": True}),
    ("AWQ gemm or gemv, groups of 128", "awq", {"bits": 4, "group_size": 128}),
    ("AWQ gemv_fast, groups of 128", "awq", {"bits": 4, "group_size": 128, "version": "gemv_fast"}),
    ("bitsandbytes NF4", "bitsandbytes-4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    (
        "bitsandbytes NF4, nested",
        "bitsandbytes-4bit",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    ("LLM.int8()", "bitsandbytes-8bit", {"load_in_8bit": True}),
    ("HQQ, 4 bits, groups of 64", "hqq", {"nbits": 4, "group_size": 64, "axis": 1}),
    ("HQQ, 4 bits, groups of 64, axis 0", "hqq", {"nbits": 4, "group_size": 64, "axis": 0}),
    ("quanto qint8", "quanto", {"weights": "int8"}),
    ("quanto qint4", "quanto", {"weights": "int4"}),
    ("quanto qfloat8", "quanto", {"weights": "float8"}),
    ("torchao int8", "torchao", {"quant_type": "int8_weight_only"}),
    ("torchao int8, dynamic", "torchao", {"quant_type": "int8_dynamic_activation_int8_weight"}),
    ("torchao int4", "torchao", {"quant_type": "int4_weight_only"}),
    ("torchao intx, 4 bits, groups of 32", "torchao", _torchao("IntxWeightOnlyConfig", **_INT4)),
    ("torchao float8", "torchao", _torchao("Float8WeightOnlyConfig")),
    ("compressed-tensors W4A16", "compressed-tensors", _preset("W4A16")),
    ("compressed-tensors W4A16_ASYM", "compressed-tensors", _preset("W4A16_ASYM")),
    ("compressed-tensors W8A16", "compressed-tensors", _preset("W8A16")),
    ("compressed-tensors W8A8", "compressed-tensors", _preset("W8A8")),
    ("compressed-tensors FP8_DYNAMIC", "compressed-tensors", _preset("FP8_DYNAMIC")),
    ("compressed-tensors NVFP4A16", "compressed-tensors", _preset("NVFP4A16")),
    ("compressed-tensors MXFP4A16", "compressed-tensors", _preset("MXFP4A16")),
    ("EETQ", "eetq", {"weights": "int8"}),
    ("FBGEMM_FP8", "fbgemm_fp8", {}),
    *((f"GGUF {name}", "gguf", GgmlType[name]) for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")),
    *((f"GGUF {name}", "gguf", GgmlType[name]) for name in ("IQ4_NL", "IQ3_S", "MXFP4", "NVFP4")),
    ("AQLM 2x8", "aqlm", {"num_codebooks": 2, "nbits_per_codebook": 8}),
)
_COLUMNS: Final[dict[str, str]] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes-4bit": "bnb 4",
    "bitsandbytes-8bit": "bnb 8",
    "hqq": "HQQ",
    "quanto": "quanto",
    "torchao": "torchao",
    "compressed-tensors": "comp.-t.",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM",
    "gguf": "GGUF",
    "aqlm": "AQLM",
}


@dataclass(frozen=True)
class Answer:
    """Whether a format holds a weight to the bit.

    Attributes:
        reason: why it doesn't; None where it does.
        conditions: what has to hold of the weight's numbers.
        spec: how it would be spelled.
    """

    reason: str | None = None
    conditions: tuple[str, ...] = ()
    spec: QuantSpec | None = None


def sources() -> Iterator[tuple[str, str, QuantSpec]]:
    """Title, wire and spec of what people have."""
    for title, name, config in SOURCES:
        wire = wire_named(name)
        settings = GgufSettings(type=config) if isinstance(config, GgmlType) else wire.parse(dict(config))
        spec: QuantSpec = wire.spec(wire.of(settings, _MODULE))
        yield title, name, without_zeros(spec) if "symmetric" in title else spec


def ask(spec: QuantSpec, wire: Wire[Any]) -> Answer:
    """Whether `wire` holds weights of `spec` to the bit, if need be with their zero points as integers."""
    first = _ask(spec, spec, wire)
    if first.reason is None or whole_zeros(spec) == spec:
        return first
    second = _ask(spec, whole_zeros(spec), wire)
    return first if second.reason else second


def _ask(spec: QuantSpec, spelled: QuantSpec, wire: Wire[Any]) -> Answer:
    try:
        settings = wire.settings_for(spelled)
        target: QuantSpec = wire.spelling(settings, spelled)
    except FormatError as error:
        return Answer(str(error))
    reason = why_not(spec, target) or wire.refusal(settings, target, _SHAPE)
    return Answer(reason) if reason else Answer(None, conditions(spec, target), target)


def table() -> str:
    """Rows of what people have, columns of formats, as Markdown; below it what the numbers in the cells stand for."""
    notes: dict[str, int] = {}
    lines = [_row(["from", *_COLUMNS.values()]), _row(["---"] * (1 + len(_COLUMNS)))]
    for title, own, spec in sources():
        cells = [_cell(ask(spec, wire_named(name)), notes, own == name) for name in _COLUMNS]
        lines.append(_row([title, *cells]))
    lines += ["", *(f"{number}. where {condition}" for condition, number in notes.items())]
    return "\n".join(lines)


def _cell(answer: Answer, notes: dict[str, int], own: bool) -> str:
    if answer.reason is not None:
        return "–"
    numbers = sorted(notes.setdefault(condition, len(notes) + 1) for condition in answer.conditions)
    return ", ".join(map(str, numbers)) if numbers else "own" if own else "yes"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
