"""HQQ as hqq's `HQQLinear` stores it: integers with real zero points, and everything about a weight in tensors.

The weight is grouped (axis 1: ``[out*in/g, g]``; axis 0: ``[g, out*in/g]``, both in row-major order) and packed along
the first axis: the first rows are in the highest bits of a word, the next in those below, and so on.

================================== ==================================================================================
``W_q``                            uint8 of 8, 4, 2 or 1 bits (5 and 6 take 8), or int32 with ten 3-bit values, the
                                   rows padded to a multiple of ten; under another dtype where ``view_as_float``
``scale``, ``zero``                ``[out*in/g, 1]`` or ``[1, out*in/g]``, in the compute dtype
``nbits``, ``group_size``, ``axis`` int32 []; 1.58 bits are fp32 [] and three values in 2 bits
``shape``                          int64 [2]
``packing``                        ASCII as uint8: ``4bit_u8`` and so on
``compute_dtype``                  ASCII as uint8: ``torch.bfloat16``; what the weight dequantizes to
``unpack_view_dtype``, ...         more of the kind that says nothing new; see :data:`FLAGS`
================================== ==================================================================================

``W = (q - zero) * scale``, each operation rounded to the compute dtype. hqq evaluates the names of dtypes as Python;
here they are looked up in a list.

Until 0.2, hqq could quantize scales and zero points once more, into ``scale_q`` and ``zero_q`` with a dictionary of
their own, ``meta_scale.*`` and ``meta_zero.*``; they are read into plain ones, as hqq computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero, pack
from lowbit.core.reference import decode_codes
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, field, require_tensors
from lowbit.wire.hqq.state import (
    FLOATS,
    PACKINGS,
    TERNARY,
    WORDS,
    as_text,
    grouped_shape,
    pack_words,
    read_meta,
    read_scales,
    read_values,
)

# What `HQQLinear.state_dict` writes besides and its loader wants to see.
FLAGS: Final = (
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
_META: Final = ("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "compute_dtype")
_NESTED: Final = tuple(
    f"meta_{of}.{name}" for of in ("scale", "zero") for name in (*_META, "view_as_float", "scale", "zero")
)


@dataclass(frozen=True)
class HqqSettings:
    """How weights are quantized; what ``config.json`` calls ``weight_quant_params``.

    Attributes:
        nbits: 8, 6, 5, 4, 3, 2, 1, or 1.58 (three values in 2 bits).
        group_size: None for whole rows (axis 1) or columns (axis 0).
        axis: 1 for groups along rows; 0 for weights that lie ``out * in / group_size`` apart in row-major order.
        view_as_float: whether the packed words are stored under the compute dtype.
        optimize: whether the zero points were optimized.
        round_zero: whether the optimization starts from rounded zero points.
        dtype: of scales and zero points, and of the weight; each stored weight says its own.
        skip: the tags of linear layers that stay dense.
        by_tag: settings of their own for modules by tag (:func:`tag_of`); then all others stay dense.
    """

    nbits: float = 4
    group_size: int | None = 64
    axis: int = 1
    view_as_float: bool = False
    optimize: bool = True
    round_zero: bool = True
    dtype: torch.dtype = torch.float16
    skip: tuple[str, ...] = ("lm_head",)
    by_tag: tuple[tuple[str, HqqSettings], ...] = ()

    @property
    def bits(self) -> int:
        return 2 if self.nbits == TERNARY else int(self.nbits)

    def tagged(self, module: str) -> HqqSettings | None:
        """The settings of a module; None where only others have any."""
        return dict(self.by_tag).get(tag_of(module)) if self.by_tag else self


def tag_of(module: str) -> str:
    """A module's name without the numbers of layers: ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj``."""
    return ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric())


class HqqWire(Wire[HqqSettings]):
    """hqq's own state dict, as Transformers 4 saved it too."""

    name: ClassVar[str] = "hqq"
    quant_method: ClassVar[str] = "hqq"
    suffixes: ClassVar[tuple[str, ...]] = (
        *_NESTED,
        *_META,
        *FLAGS,
        "W_q",
        "scale",
        "zero",
        "zero_scale",
        "scale_q",
        "zero_q",
    )
    marker: ClassVar[str] = "W_q"
    describes_itself: ClassVar[bool] = True

    def parse(self, config: Json) -> HqqSettings:
        stored = config.get("quant_config", config)
        if not isinstance(stored, Mapping):
            raise FormatError("quantization_config.quant_config is not an object", found=repr(stored)[:80])
        skip = _texts(config.get("skip_modules"), ("lm_head",))
        if "weight_quant_params" in stored or stored is config:
            return replace(_parse_params(stored.get("weight_quant_params", stored)), skip=skip)
        tagged = []
        for tag, own in stored.items():
            if own is not None and not (isinstance(own, Mapping) and "weight_quant_params" in own):
                raise FormatError(
                    f"quant_config of '{tag}' lacks weight_quant_params", found=repr(own)[:80], expected="an object"
                )
            if own is not None:
                tagged.append((str(tag), _parse_params(own["weight_quant_params"])))
        return HqqSettings(skip=skip, by_tag=tuple(tagged))

    def config(self, settings: HqqSettings) -> dict[str, Any]:
        own = {tag: _quant_config(tagged) for tag, tagged in settings.by_tag}
        return {
            "quant_config": own or _quant_config(settings),
            "quant_method": "hqq",
            "skip_modules": list(settings.skip),
        }

    def describe(self, modules: Sequence[str], read: Callable[[str], Tensor | None]) -> dict[str, Any]:
        settings = {}
        for module in modules:
            found = {name: read(f"{module}.{name}") for name in (*_META, "view_as_float")}
            try:
                meta = read_meta({name: tensor for name, tensor in found.items() if tensor is not None})
            except FormatError as error:
                raise error.inside(module) from error
            settings[module] = HqqSettings(
                meta.nbits, meta.size, meta.axis, meta.view_as_float, round_zero=meta.nbits == 4
            )
        return self.config(self.join(settings, ()))

    def of(self, settings: HqqSettings, module: str) -> HqqSettings:
        # A weight that is packed though no tag names it says everything itself.
        return settings.tagged(module) or replace(settings, by_tag=())

    def settings_for(self, spec: QuantSpec) -> HqqSettings:
        grouping = spec.grouping
        if not isinstance(spec.code, IntCode):
            raise FormatError("HQQ holds integers of 1 to 8 bits", found=spec, expected="integer codes")
        by_rows = grouping == Grouping.per_channel()
        if not (by_rows or _is_column(grouping) or (grouping.rows == 1 and grouping.cols and not grouping.permuted)):
            raise FormatError("HQQ has groups of consecutive weights", found=spec, expected="one axis of scales")
        return HqqSettings(
            nbits=8 if spec.bits == 7 else spec.bits,
            group_size=None if by_rows or _is_column(grouping) else grouping.cols,
            axis=0 if grouping.strided or _is_column(grouping) else 1,
            optimize=spec.zero is not None and spec.zero.kind == "float",
            round_zero=spec.bits == 4 or spec.zero is None or spec.zero.kind == "integer",
            dtype=spec.dtype,
        )

    def spelling(self, settings: HqqSettings, spec: QuantSpec) -> QuantSpec:
        dtype = spec.scale.dtype if spec.scale.second is None else spec.dtype
        own = replace(self.spec(settings), dtype=spec.dtype, scale=Scale(dtype), zero=Zero("float", dtype=dtype))
        return replace(own, grouping=spec.grouping) if spec.grouping.flat else own

    def join(self, settings: Mapping[str, HqqSettings], kept: Collection[str]) -> HqqSettings:
        skip = ("lm_head", *sorted({tag_of(name) for name in kept} - {"lm_head"}))
        first = next(iter(settings.values()))
        if all(replace(own, dtype=first.dtype) == first for own in settings.values()):
            return replace(first, skip=skip)
        tagged: dict[str, HqqSettings] = {}
        for module, own in settings.items():
            known = tagged.setdefault(tag_of(module), replace(own, dtype=first.dtype))
            if known != replace(own, dtype=first.dtype):
                raise FormatError(
                    "HQQ has one setting for all modules of the same tag", tensor=module, found=own, expected=known
                )
        return HqqSettings(skip=skip, dtype=first.dtype, by_tag=tuple(sorted(tagged.items())))

    def spec(self, settings: HqqSettings) -> QuantSpec:
        size = settings.group_size
        if settings.axis == 0:
            grouping = Grouping.strided_groups(size) if size else Grouping(rows=0, cols=1)
        else:
            grouping = Grouping.groups(size) if size else Grouping.per_channel()
        return _spec(settings.bits, grouping, settings.dtype, settings.dtype, settings.dtype)

    def spec_for(self, settings: HqqSettings, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec:
        """The spec of a weight of `shape` and `dtype`, as :meth:`read` gives it."""
        size = settings.group_size or shape[settings.axis]
        return _spec(settings.bits, _grouping(size, settings.axis, shape), dtype, dtype, dtype)

    def expected(self, settings: HqqSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        axis, size = _axis_and_size(spec.grouping, shape)
        packing = PACKINGS[spec.bits]
        rows, cols = grouped_shape(size, axis, shape)
        per_word, _, word = WORDS[packing]
        per_group = (rows, 1) if axis == 1 else (1, cols)
        stored = (-(-rows // per_word), cols)
        if settings.view_as_float:
            word, stored = spec.dtype, (stored[0], cols * word.itemsize // spec.dtype.itemsize)
        layout: TensorLayout = {
            "W_q": (stored, word),
            "scale": (per_group, spec.scale.dtype),
            "zero": (per_group, spec.zero.dtype if spec.zero else spec.dtype),
            "nbits": ((), torch.float32 if _is_ternary(settings, spec) else torch.int32),
            "group_size": ((), torch.int32),
            "axis": ((), torch.int32),
            "shape": ((2,), torch.int64),
            "packing": ((len(packing),), torch.uint8),
            "compute_dtype": ((len(str(spec.dtype)),), torch.uint8),
            "unpack_view_dtype": ((len(str(WORDS[packing][2])),), torch.uint8),
        }
        return layout | dict.fromkeys(FLAGS, ((), torch.uint8))

    def read(self, settings: HqqSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        require_tensors(tensors, ("W_q",))
        meta = read_meta(tensors)
        shape = meta.shape
        values = read_values(meta, tensors["W_q"]).reshape(shape)
        scale, zero = read_scales(meta, tensors)
        grouping = _grouping(meta.size or shape[meta.axis], meta.axis, shape)
        spec = _spec(meta.bits, grouping, meta.dtype, scale.dtype, zero.dtype)
        own = {
            "codes": _store(values, spec),
            "scales": scale.reshape(grouping.counts(shape)),
            "zeros": zero.reshape(grouping.counts(shape)),
        }
        return QuantTensor(spec, own, shape).validate()

    def write(self, settings: HqqSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        spec, shape = tensor.spec, tensor.shape
        if reason := self.refusal(settings, spec, shape):
            raise FormatError(f"HQQ can't spell this weight: {reason}", found=spec)
        axis, size = _axis_and_size(spec.grouping, shape)
        packing = PACKINGS[spec.bits]
        words = pack_words(decode_codes(spec, tensor.tensors, shape).reshape(grouped_shape(size, axis, shape)), packing)
        per_group = (-1, 1) if axis == 1 else (1, -1)
        ternary = _is_ternary(settings, spec)
        written = {
            "W_q": words.view(spec.dtype) if settings.view_as_float else words,
            "scale": tensor.tensors["scales"].reshape(per_group),
            "zero": tensor.tensors["zeros"].reshape(per_group),
            "nbits": torch.tensor(TERNARY if ternary else spec.bits, dtype=torch.float32 if ternary else torch.int32),
            "group_size": torch.tensor(size, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "shape": torch.tensor(shape),
            "packing": as_text(packing),
            "compute_dtype": as_text(str(spec.dtype)),
            "unpack_view_dtype": as_text(str(WORDS[packing][2])),
        }
        values = {
            "view_as_float": settings.view_as_float,
            "optimize": settings.optimize,
            "round_zero": settings.round_zero,
        }
        yes = ("encoded_state_dict", "stores_quant_config", "channel_wise")
        flags = {name: torch.tensor(int(values.get(name, name in yes)), dtype=torch.uint8) for name in FLAGS}
        return {name: value.to(tensor.device) for name, value in (written | flags).items()}

    def refusal(self, settings: HqqSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if not isinstance(spec.code, IntCode) or spec.bits not in PACKINGS:
            return f"HQQ has unsigned integers of {', '.join(map(str, PACKINGS))} bits, not {spec.code}"
        zero = spec.zero.dtype if spec.zero else spec.dtype
        if spec != _spec(spec.bits, spec.grouping, spec.dtype, spec.scale.dtype, zero):
            return f"HQQ holds '{_spec(spec.bits, spec.grouping, spec.dtype, spec.dtype, spec.dtype)}'"
        grouping = spec.grouping
        if (
            grouping != Grouping.per_channel()
            and not _is_column(grouping)
            and (grouping.rows != 1 or not grouping.cols)
        ):
            return f"HQQ has groups of consecutive weights, not {grouping}"
        if grouping.permuted or spec.dtype not in FLOATS.values():
            return f"HQQ has no permutation and dequantizes to {', '.join(FLOATS)}"
        axis, size = _axis_and_size(grouping, shape)
        if shape[0] * shape[1] % size or (not grouping.linear and axis == 1 and shape[1] % size):
            return f"groups of {size} don't divide {shape[0]} x {shape[1]}"
        rows, cols = grouped_shape(size, axis, shape)
        per_word, _, word = WORDS[PACKINGS[spec.bits]]
        if per_word != 10 and rows % per_word:
            return f"{rows} rows of groups don't fill words of {per_word} values"
        if settings.view_as_float and cols * word.itemsize % spec.dtype.itemsize:
            return f"{cols} words of {word} don't fill whole {spec.dtype} numbers"
        return None


def _spec(bits: int, grouping: Grouping, dtype: torch.dtype, scales: torch.dtype, zeros: torch.dtype) -> QuantSpec:
    return QuantSpec(IntCode(bits), Scale(scales), grouping, Zero("float", dtype=zeros), dtype=dtype, rounding="each")


# ------------------------------------------------------------------------------------------------------------ config


def _parse_params(params: object) -> HqqSettings:
    if not isinstance(params, Mapping):
        raise FormatError("weight_quant_params is not an object", found=repr(params)[:80])
    bits, size = params.get("nbits", 4), params.get("group_size", 64)
    if type(bits) not in (int, float) or bits not in PACKINGS or (type(bits) is float and bits != TERNARY):
        raise FormatError("nbits is out of range", found=repr(bits)[:80], expected=list(PACKINGS))
    if size is not None and (type(size) is not int or size <= 0):
        raise FormatError("group_size is out of range", found=repr(size)[:80], expected="a positive integer or null")
    axis = 1 if params.get("axis") is None else params["axis"]
    if type(axis) is not int or axis not in (0, 1):
        raise FormatError("axis is out of range", found=repr(axis)[:80], expected="0 or 1")
    if not field(params, "channel_wise", bool, True):
        raise FormatError("one scale per weight is not supported", found="channel_wise: false", expected="true")
    return HqqSettings(
        nbits=bits,
        group_size=size,
        axis=axis,
        view_as_float=field(params, "view_as_float", bool, False),
        optimize=field(params, "optimize", bool, True),
        round_zero=field(params, "round_zero", bool, bits == 4),
    )


def _quant_config(settings: HqqSettings) -> dict[str, Any]:
    return {
        "weight_quant_params": {
            "nbits": settings.nbits,
            "channel_wise": True,
            "group_size": settings.group_size,
            "optimize": settings.optimize,
            "round_zero": settings.round_zero,
            "axis": settings.axis,
            "view_as_float": settings.view_as_float,
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def _texts(value: object, default: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return default
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise FormatError("quantization_config.skip_modules is a list of names", found=repr(value)[:80])
    return tuple(value)


def _is_column(grouping: Grouping) -> bool:
    """Whether each column of the weight has a scale: axis 0 without groups."""
    return grouping == Grouping(rows=0, cols=1)


def _grouping(size: int, axis: int, shape: tuple[int, int]) -> Grouping:
    if axis == 0:
        return Grouping(rows=0, cols=1) if size == shape[0] else Grouping.strided_groups(size)
    if size == shape[1]:
        return Grouping.per_channel()
    return Grouping.flat_blocks(size) if shape[1] % size else Grouping.groups(size)


def _axis_and_size(grouping: Grouping, shape: tuple[int, int]) -> tuple[int, int]:
    if _is_column(grouping):
        return 0, shape[0]
    return (0 if grouping.strided else 1), grouping.cols or shape[1]


def _store(values: Tensor, spec: QuantSpec) -> Tensor:
    if spec.bits == 8:
        return values.contiguous()
    return pack(values.reshape(-1) if spec.grouping.flat else values, spec.bits)


def _is_ternary(settings: HqqSettings, spec: QuantSpec) -> bool:
    return settings.nbits == TERNARY and spec.bits == 2
