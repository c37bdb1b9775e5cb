"""bitsandbytes: NF4 and FP4 with blockwise statistics, plain or nested, and LLM.int8() rows.

4 bits, beside a module's ``bias``:

===================================== ==================================================================
``weight``                            uint8 ``[ceil(out*in/2), 1]``, or the same bytes under another dtype
                                      (`quant_storage`); the high nibble is the even element, row-major
``weight.absmax``                     fp32 per block; uint8 where nested
``weight.quant_map``                  fp32 [16]
``weight.nested_absmax``              fp32 per 256 blocks
``weight.nested_quant_map``           fp32 [256]
``weight.quant_state.bitsandbytes__*`` UTF-8 JSON as uint8: type, block size, dtype, shape, nesting
===================================== ==================================================================

8 bits: ``weight int8 [out, in]``, ``SCB fp32 [out]`` (the rows' absolute maxima), ``weight_format uint8 []``, 0, which
older checkpoints lack.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import QuantSpec, QuantTensor, TableCode, dtypes, int8_spec, table_spec
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import (
    Json,
    Wire,
    as_bytes,
    bits_for,
    field,
    group_size_for,
    names_in,
    require_tensor,
    require_tensors,
)

BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES: Final = ("nf4", "fp4")
STORAGE: Final = dtypes.FLOATS | {name: dtypes.INTEGERS[name] for name in ("uint8", "int8")}
_STATE: Final = "weight.quant_state.bitsandbytes__"
_STATE_LIMIT: Final = 4096  # bytes; the real ones are under 200


@dataclass(frozen=True)
class Settings4:
    """What ``config.json`` says of a 4-bit checkpoint; dtype and block size of a weight are in its own state."""

    type: str = "fp4"
    nested: bool = False
    storage: torch.dtype = torch.uint8
    compute_dtype: torch.dtype = torch.float32
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings8:
    """What ``config.json`` says of an 8-bit checkpoint."""

    threshold: float = 6.0
    skip: tuple[str, ...] = ()


class Bitsandbytes4Wire(Wire[Settings4]):
    """NF4 and FP4, plain or nested."""

    name: ClassVar[str] = "bitsandbytes-4bit"
    quant_method: ClassVar[str] = "bitsandbytes"
    suffixes: ClassVar[tuple[str, ...]] = (
        f"{_STATE}nf4",
        f"{_STATE}fp4",
        "weight.nested_quant_map",
        "weight.nested_absmax",
        "weight.quant_map",
        "weight.absmax",
        "weight",
    )
    marker: ClassVar[str] = "weight.absmax"

    def detect(self, config: Json) -> bool:
        return is_bitsandbytes(config) and config.get("load_in_4bit", config.get("_load_in_4bit")) is True

    def parse(self, config: Json) -> Settings4:
        return Settings4(
            type=field(config, "bnb_4bit_quant_type", str, "fp4", allowed=TYPES),
            nested=field(config, "bnb_4bit_use_double_quant", bool, False),
            storage=dtypes.parse(config.get("bnb_4bit_quant_storage") or "uint8", STORAGE),
            compute_dtype=dtypes.parse(config.get("bnb_4bit_compute_dtype") or "float32"),
            skip=names_in(config, "llm_int8_skip_modules"),
        )

    def config(self, settings: Settings4) -> dict[str, Any]:
        return _config(four=True) | {
            "bnb_4bit_compute_dtype": dtypes.name_of(settings.compute_dtype),
            "bnb_4bit_quant_storage": dtypes.name_of(settings.storage),
            "bnb_4bit_quant_type": settings.type,
            "bnb_4bit_use_double_quant": settings.nested,
            "llm_int8_skip_modules": list(settings.skip) or None,
        }

    def settings_for(self, spec: QuantSpec) -> Settings4:
        bits_for(spec, (4,))
        name = spec.code.name if isinstance(spec.code, TableCode) and spec.code.name in TYPES else "nf4"
        size = group_size_for(spec)
        second = spec.scale.second
        return Settings4(
            name,
            nested=second is not None and second.kind == "table",
            compute_dtype=spec.dtype,
            block_size=next((block for block in reversed(BLOCK_SIZES) if size > 0 and size % block == 0), 64),
            dtype=spec.dtype,
        )

    def vary(self, settings: Settings4, variant: str) -> Settings4:
        if variant not in TYPES:
            raise FormatError("unknown variant of 4-bit bitsandbytes", found=variant, expected=list(TYPES))
        return replace(settings, type=variant)

    def spelling(self, settings: Settings4, spec: QuantSpec) -> QuantSpec:
        second = spec.scale.second
        nested = settings.nested and second is not None
        return table_spec(
            settings.type,
            block_size=settings.block_size,
            nested=nested,
            nested_block=second.size if nested and second else 256,
            dtype=spec.dtype,
        )

    def join(self, settings: Mapping[str, Settings4], kept: Collection[str]) -> Settings4:
        # Block sizes and dtypes are in each weight's own state.
        first = next(iter(settings.values()))
        alike = {
            name: replace(own, block_size=first.block_size, dtype=first.dtype, compute_dtype=first.compute_dtype)
            for name, own in settings.items()
        }
        return replace(super().join(alike, kept), skip=_skip(kept))

    def spec(self, settings: Settings4) -> QuantSpec:
        return table_spec(settings.type, block_size=settings.block_size, nested=settings.nested, dtype=settings.dtype)

    def expected(self, settings: Settings4, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        blocks = spec.grouping.counts(shape)[0]
        size = -(-shape[0] * shape[1] // 2) // settings.storage.itemsize
        layout: TensorLayout = {
            "weight": ((size, 1), settings.storage),
            "weight.absmax": ((blocks,), torch.uint8 if spec.scale.second else torch.float32),
            "weight.quant_map": ((16,), torch.float32),
        }
        if spec.scale.second:
            supers = -(-blocks // spec.scale.second.size)
            layout["weight.nested_absmax"] = ((supers,), torch.float32)
            layout["weight.nested_quant_map"] = ((256,), torch.float32)
        return layout

    def read(self, settings: Settings4, tensors: Mapping[str, Tensor]) -> QuantTensor:
        require_tensors(tensors, ("weight", "weight.absmax", "weight.quant_map"))
        state = _read_state(tensors)
        if state.type != settings.type:
            raise FormatError("a weight's type is not the checkpoint's", found=state.type, expected=settings.type)
        spec = table_spec(
            state.type,
            block_size=state.block_size,
            nested=state.nested,
            nested_block=state.nested_block_size,
            dtype=state.dtype,
        )
        codes = _swap_nibbles(as_bytes(tensors["weight"].reshape(-1)))
        if state.shape[0] * state.shape[1] % 2:
            codes[-1:] &= 0x0F
        own = {
            "codes": codes,
            "table": tensors["weight.quant_map"],
            "scales": tensors["weight.absmax"],
        }
        if state.nested:
            require_tensors(tensors, ("weight.nested_absmax", "weight.nested_quant_map"))
            own["super_scales"] = tensors["weight.nested_absmax"]
            own["super_scales_table"] = tensors["weight.nested_quant_map"]
            own["super_scales_offset"] = torch.tensor([state.nested_offset], device=codes.device)
        return QuantTensor(spec, own, state.shape).validate()

    def write(self, settings: Settings4, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"bitsandbytes can't spell this weight: {reason}", found=tensor.spec)
        own = tensor.tensors
        packed = _swap_nibbles(own["codes"])
        if tensor.shape[0] * tensor.shape[1] % 2:
            packed[-1:] |= int(own["table"].abs().argmin())  # bitsandbytes fills up with the code of the number 0
        written = {
            "weight": packed.view(settings.storage).unsqueeze(1),
            "weight.absmax": own["scales"],
            "weight.quant_map": own["table"],
        }
        if tensor.spec.scale.second:
            written["weight.nested_absmax"] = own["super_scales"]
            written["weight.nested_quant_map"] = own["super_scales_table"]
        written[f"{_STATE}{tensor.spec.code}"] = _write_state(tensor).to(tensor.device)
        return written

    def refusal(self, settings: Settings4, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if not isinstance(spec.code, TableCode) or spec.code.name not in TYPES or not spec.grouping.flat:
            return "it holds nf4 or fp4 in blocks of consecutive weights"
        second = spec.scale.second
        wanted = table_spec(
            spec.code.name,
            block_size=spec.grouping.cols,
            nested=second is not None,
            nested_block=second.size if second else 256,
            dtype=spec.dtype,
        )
        if spec != wanted or spec.grouping.cols not in BLOCK_SIZES:
            return f"it holds '{wanted}' with blocks of one of {BLOCK_SIZES}"
        if -(-shape[0] * shape[1] // 2) % settings.storage.itemsize:
            return f"{shape[0]} x {shape[1]} nibbles don't fill whole {settings.storage} numbers"
        return None


class Bitsandbytes8Wire(Wire[Settings8]):
    """LLM.int8() rows."""

    name: ClassVar[str] = "bitsandbytes-8bit"
    quant_method: ClassVar[str] = "bitsandbytes"
    suffixes: ClassVar[tuple[str, ...]] = ("weight_format", "SCB", "weight")
    marker: ClassVar[str] = "SCB"

    def detect(self, config: Json) -> bool:
        return is_bitsandbytes(config) and config.get("load_in_8bit", config.get("_load_in_8bit")) is True

    def parse(self, config: Json) -> Settings8:
        threshold = config.get("llm_int8_threshold", 6.0)
        if type(threshold) not in (int, float) or not 0 <= threshold < float("inf"):
            raise FormatError(
                "quantization_config.llm_int8_threshold is out of range",
                found=repr(threshold)[:80],
                expected="0 or more",
            )
        return Settings8(float(threshold), names_in(config, "llm_int8_skip_modules"))

    def config(self, settings: Settings8) -> dict[str, Any]:
        skip = list(settings.skip) or None
        return _config(four=False) | {"llm_int8_threshold": settings.threshold, "llm_int8_skip_modules": skip}

    def settings_for(self, spec: QuantSpec) -> Settings8:
        bits_for(spec, (8,))
        return Settings8(spec.activation.threshold if spec.activation.kind == "int8" else 6.0)

    def join(self, settings: Mapping[str, Settings8], kept: Collection[str]) -> Settings8:
        return replace(super().join(settings, kept), skip=_skip(kept))

    def spec(self, settings: Settings8) -> QuantSpec:
        return int8_spec(settings.threshold)

    def expected(self, settings: Settings8, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        return {
            "weight": (shape, torch.int8),
            "SCB": ((shape[0],), torch.float32),
            "weight_format": ((), torch.uint8),
        }

    def read(self, settings: Settings8, tensors: Mapping[str, Tensor]) -> QuantTensor:
        require_tensors(tensors, ("weight", "SCB"))
        weight, absmax = tensors["weight"], tensors["SCB"]
        require_tensor("weight", weight, dtypes=(torch.int8,), dims=2)
        require_tensor("SCB", absmax, shape=(weight.shape[0],), dtypes=(torch.float32,))
        if "weight_format" in tensors:
            layout = tensors["weight_format"]
            require_tensor("weight_format", layout, shape=(), dtypes=(torch.uint8,))
            if int(layout) != 0:
                raise FormatError(
                    "this weight is in the layout of one GPU generation; save it again with bitsandbytes 0.45 or later",
                    tensor="weight_format",
                    found=int(layout),
                    expected="0 (rows)",
                )
        own = {"codes": weight.contiguous(), "scales": absmax.unsqueeze(1)}
        return QuantTensor(self.spec(settings), own, (weight.shape[0], weight.shape[1])).validate()

    def write(self, settings: Settings8, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"bitsandbytes can't spell this weight: {reason}", found=tensor.spec)
        return {
            "weight": tensor.tensors["codes"],
            "SCB": tensor.tensors["scales"].squeeze(1),
            "weight_format": torch.tensor(0, dtype=torch.uint8, device=tensor.device),
        }

    def refusal(self, settings: Settings8, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        wanted = self.spec(settings)
        return None if spec == wanted else f"the checkpoint holds '{wanted}'"


def is_bitsandbytes(config: Json) -> bool:
    """By method, or by the flags alone, as the first checkpoints had it."""
    return config.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(
        {"load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"} & set(config)
    )


def _skip(kept: Collection[str]) -> tuple[str, ...]:
    """Readers leave heads alone by themselves, but only as long as nothing is listed."""
    return tuple(kept) if any("." in name for name in kept) else ()


def _config(*, four: bool) -> dict[str, Any]:
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def _swap_nibbles(packed: Tensor) -> Tensor:
    """Between high-nibble-first and low-nibble-first order."""
    return (packed << 4) | (packed >> 4)


@dataclass(frozen=True)
class _State:
    type: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested: bool
    nested_block_size: int
    nested_offset: float


def _read_state(tensors: Mapping[str, Tensor]) -> _State:
    names = [name for name in tensors if name.startswith(_STATE)]
    if len(names) != 1:
        raise FormatError("a 4-bit weight has one quantization state", found=names, expected=f"{_STATE}nf4 or fp4")
    blob = tensors[names[0]]
    require_tensor(names[0], blob, dtypes=(torch.uint8,), dims=1)
    if blob.numel() > _STATE_LIMIT:
        raise FormatError(
            "the quantization state is too long", tensor=names[0], found=blob.numel(), expected=_STATE_LIMIT
        )
    try:
        data = json.loads(bytes(blob.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the quantization state is not JSON: {error}", tensor=names[0]) from error
    if not isinstance(data, dict):
        raise FormatError("the quantization state is not a JSON object", tensor=names[0], found=repr(data)[:80])
    try:
        return _parse_state(data)
    except FormatError as error:
        raise error.located(tensor=names[0]) from error


def _parse_state(data: Json) -> _State:
    shape = data.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(side) is not int or side <= 0 for side in shape):
        raise FormatError("the weight's shape has to be two positive integers", found=repr(shape)[:80])
    nested = "nested_blocksize" in data
    offset = data.get("nested_offset", 0.0)
    if type(offset) not in (int, float):
        raise FormatError("nested_offset is not a number", found=repr(offset)[:80])
    if nested:
        field(data, "nested_dtype", str, "float32", allowed=("float32",))
    return _State(
        type=field(data, "quant_type", str, allowed=TYPES),
        block_size=field(data, "blocksize", int, allowed=BLOCK_SIZES),
        dtype=dtypes.parse(data.get("dtype")),
        shape=(shape[0], shape[1]),
        nested=nested,
        nested_block_size=field(data, "nested_blocksize", int, 256, allowed=BLOCK_SIZES),
        nested_offset=float(offset),
    )


def _write_state(tensor: QuantTensor) -> Tensor:
    spec = tensor.spec
    state: dict[str, Any] = {
        "quant_type": str(spec.code),
        "blocksize": spec.grouping.cols,
        "dtype": dtypes.name_of(spec.dtype),
        "shape": list(tensor.shape),
    }
    if spec.scale.second:
        state["nested_blocksize"] = spec.scale.second.size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = tensor.tensors["super_scales_offset"].item()
    return torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8)
