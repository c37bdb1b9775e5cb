"""What torchao says of each tensor in a file's header: its class, the size of a block, the dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from lowbit.core import Activation, QuantSpec, dtypes
from lowbit.errors import FormatError
from lowbit.wire.base import Json
from lowbit.wire.torchao.config import (
    AUTO_KERNEL,
    FLOAT8,
    INT4,
    INT8,
    INTX,
    PER_TOKEN,
    SYMMETRIC,
    AoConfig,
    block_of,
    choice,
    flag,
    float8_dtype,
    float8_policy,
    float_dtype,
    granularity,
    int8_policy,
    integer_bits,
    parse_object,
    stored_dtype,
    tagged,
)


@dataclass(frozen=True)
class Header:
    """What a file's header says of one packed weight.

    Attributes:
        text: the entry as it stands there.
        block: rows and columns of a block with one scale.
        dtype: of the weight before; None where the scales' says it.
        bits: of integers.
    """

    text: str
    kind: str
    block: tuple[int, int]
    dtype: torch.dtype | None
    bits: int = 8
    activation: Activation = field(default_factory=Activation)


# The parts that a tensor of each class has, and those that it may have.
_PARTS: Final[dict[str, tuple[set[str], set[str]]]] = {
    INT4: ({"qdata", "scale", "zero_point"}, set()),
    INT8: ({"qdata", "scale"}, {"zero_point"}),
    FLOAT8: ({"qdata", "scale"}, set()),
    INTX: ({"qdata", "scale", "zero_point"}, set()),
}


def parse_header(text: str) -> Header | None:
    """One entry of a header; None where the tensor is a plain one.

    Raises:
        FormatError: not JSON, a class that is not known, or parts or values that lowbit doesn't know.
    """
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON: {error}", found=text[:80]) from error
    if isinstance(entry, Mapping) and entry.get("_type") == "Tensor":
        return None
    kind, fields = parse_object(entry, "the header")
    if kind not in _PARTS:
        raise FormatError("a tensor of a class that lowbit doesn't know", found=kind[:80], expected=list(_PARTS))
    _check_parts(kind, entry.get("_tensor_data_names"))
    block = block_of(fields.get("block_size"))
    if kind == INT4:
        return _int4_header(text, block, fields)
    dtype = float_dtype(fields.get("dtype"))
    if kind == INTX:
        bits = integer_bits(fields.get("target_dtype"))
        return Header(text, INTX, block, dtype, bits, _token(fields.get("activation_quantization")))
    return Header(text, kind, block, dtype, activation=_policy(fields.get("act_quant_kwargs")))


def _check_parts(kind: str, found: object) -> None:
    needed, allowed = _PARTS[kind]
    names = {str(name) for name in found} if isinstance(found, list) else set()
    if not needed <= names <= needed | allowed:
        raise FormatError(
            f"an {kind} with parts that lowbit doesn't know", found=repr(found)[:120], expected=sorted(needed)
        )


def _int4_header(text: str, block: tuple[int, int], fields: Json) -> Header:
    spelled = fields.get("activation_dtype")
    if spelled is not None and tagged(spelled, "torch.dtype") != "bfloat16":
        raise FormatError("Int4Tensor with activations in another dtype", found=spelled, expected="bfloat16")
    return Header(text, INT4, block, None, bits=4)


def _token(value: object) -> Activation:
    if value not in (None, "int8_asym_per_token"):
        raise FormatError("unknown activation_quantization", found=repr(value)[:80], expected="int8_asym_per_token")
    return Activation() if value is None else PER_TOKEN


def _policy(value: object) -> Activation:
    """Of ``act_quant_kwargs``."""
    if value is None:
        return Activation()
    name, fields = parse_object(value, "act_quant_kwargs")
    block = granularity(fields.get("granularity"))
    if name == "QuantizeTensorToInt8Kwargs":
        mapping = choice({"mapping_type": SYMMETRIC, **fields}, "mapping_type", "symmetric", "asymmetric")
        return int8_policy(block, mapping, flag(fields.get("reduce_range"), "reduce_range"))
    if name == "QuantizeTensorToFloat8Kwargs":
        number = float8_dtype(fields.get("float8_dtype"))
        return float8_policy(block, number, fields.get("hp_value_lb"), fields.get("hp_value_ub"))
    raise FormatError("unknown quantization of activations", found=name[:80])


# In which torchao lists the parts.
_ORDER: Final = {
    INT4: ["qdata", "scale", "zero_point"],
    INT8: ["zero_point", "qdata", "scale"],
    FLOAT8: ["qdata", "scale"],
    INTX: ["qdata", "scale", "zero_point"],
}


def write_header(config: AoConfig, spec: QuantSpec, shape: tuple[int, int]) -> str:
    """The entry of a weight ``[out, in]``, as torchao writes it."""
    block = [spec.grouping.rows or shape[0], spec.grouping.cols or shape[1]]
    own = stored_dtype(dtypes.name_of(spec.dtype))
    fields: dict[str, Any]
    if config.kind == INT4:
        fields = {"activation_dtype": stored_dtype("bfloat16"), "block_size": block, "shape": list(shape)}
    elif config.kind == INT8:
        fields = {
            "act_quant_kwargs": _kwargs(config),
            "reduce_range": config.reduced,
            "block_size": block,
            "dtype": own,
        }
    elif config.kind == FLOAT8:
        stored = config.data["_data"]
        fields = {
            "block_size": block,
            "mm_config": _untagged(stored.get("mm_config")),
            "act_quant_kwargs": _kwargs(config),
            "kernel_preference": stored.get("kernel_preference", AUTO_KERNEL),
            "dtype": own,
        }
    else:
        fields = {
            "target_dtype": stored_dtype(f"int{config.code.bits}"),
            "block_size": block,
            "dtype": own,
            "activation_quantization": None if config.activation.kind == "none" else "int8_asym_per_token",
        }
    return json.dumps({"_type": config.kind, "_data": fields, "_tensor_data_names": _ORDER[config.kind]})


def _kwargs(config: AoConfig) -> dict[str, Any] | None:
    """``act_quant_kwargs`` of a config with dynamic activations."""
    if config.activation.kind == "none":
        return None
    fields = config.data["_data"]
    both = fields["granularity"]
    inputs = _untagged(both[0] if isinstance(both, list) else both)
    if config.kind == INT8:
        own = {
            "granularity": inputs,
            "mapping_type": fields["act_mapping_type"],
            "reduce_range": config.reduced,
        }
        return {"_type": "QuantizeTensorToInt8Kwargs", "_data": own}
    own = {
        "float8_dtype": fields["activation_dtype"],
        "granularity": inputs,
        "mm_config": None,
        "hp_value_lb": fields["activation_value_lb"],
        "hp_value_ub": fields["activation_value_ub"],
        "kernel_preference": fields["kernel_preference"],
    }
    return {"_type": "QuantizeTensorToFloat8Kwargs", "_data": own}


def _untagged(value: Any) -> Any:
    """An object as headers have it: without the version that configs store."""
    if isinstance(value, Mapping) and "_type" in value:
        return {"_type": value["_type"], "_data": value.get("_data", {})}
    return value
