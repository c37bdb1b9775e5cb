"""quanto as optimum-quanto's `QuantizedModelForCausalLM` saves it: tensors by name, and a map of types beside them.

8 bits (``qint8``, ``qfloat8_e4m3fn``, ``qfloat8_e5m2``):

======================== ================================================================================
``weight._data``         int8 or float8 ``[out, in]``
``weight._scale``        ``[out, 1]`` in the model's dtype (``[]`` where there is one row)
======================== ================================================================================

2 and 4 bits (``qint2``, ``qint4``), the weight in groups of g along the input axis, ``[out*in/g, g]``:

======================== ================================================================================
``weight._data._data``   uint8 ``[ceil(out*in/g * bits/8), g]``; the first rows are in the lowest bits
``weight._scale``        ``[out*in/g, 1]`` in the model's dtype
``weight._shift``        the same; ``W = scale * q - shift``, each operation rounded. Where it holds integers,
                         ``W = scale * (q - shift)``
======================== ================================================================================

g is 128, 96, 64 or 32, the largest of these that divides the input axis if that is longer than 128, else whole rows.
Nothing stored says how long a row is: see :meth:`QuantoWire.with_shapes`.

``input_scale`` and ``output_scale`` (``[]``) are those of activations, 1 where there are none. ``quanto_qmap.json``
maps modules to ``{"weights": "qint4", "activations": "none"}``; quanto itself writes nothing into ``config.json``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import Activation, FloatCode, Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero, pack
from lowbit.core.reference import decode_codes, decode_zeros
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, require_tensor, require_tensors

QMAP: Final = "quanto_qmap.json"
# The types as quanto names them, by QuantoConfig's names; the last one is an addition of ours.
TYPES: Final = {
    "int2": "qint2",
    "int4": "qint4",
    "int8": "qint8",
    "float8": "qfloat8_e4m3fn",
    "float8_e5m2": "qfloat8_e5m2",
}
NONE: Final = "none"
_NAMES: Final = {qtype: name for name, qtype in TYPES.items()}
_OF_ACTIVATIONS: Final = ("int8", "float8", "float8_e5m2")
_CODES: Final[dict[str, IntCode | FloatCode]] = {
    "qint2": IntCode(2),
    "qint4": IntCode(4),
    "qint8": IntCode(8, signed=True),
    "qfloat8_e4m3fn": FloatCode(torch.float8_e4m3fn),
    "qfloat8_e5m2": FloatCode(torch.float8_e5m2),
}
_LARGEST, _STEP = 128, 32  # groups
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantoSettings:
    """How weights and activations are stored.

    Attributes:
        weights: quanto's name of a type, see :data:`TYPES`.
        activations: likewise, or ``none``.
        dtype: of scales, and of the weight; each stored weight says its own.
        whole_zeros: whether the shifts of 2 and 4 bits are integers; each stored weight says its own.
        skip: patterns of linear layers that stay dense.
        by_module: weights and activations of each module, where they are not the same for all.
        shapes: ``(out, in)`` of modules, as far as known; not part of the format.
    """

    weights: str = "qint8"
    activations: str = NONE
    dtype: torch.dtype = torch.bfloat16
    whole_zeros: bool = False
    skip: tuple[str, ...] = ()
    by_module: tuple[tuple[str, tuple[str, str]], ...] = ()
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)


def group_size(weights: str, in_features: int) -> int | None:
    """How many weights share a scale, by quanto's rule; None for a whole row."""
    if _CODES[weights].bits == 8 or in_features <= _LARGEST:
        return None
    return next((size for size in range(_LARGEST, 0, -_STEP) if in_features % size == 0), None)


class QuantoWire(Wire[QuantoSettings]):
    """quanto's own serialization."""

    name: ClassVar[str] = "quanto"
    quant_method: ClassVar[str] = "quanto"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight._data._data",
        "weight._data",
        "weight._scale",
        "weight._shift",
        "input_scale",
        "output_scale",
    )
    marker: ClassVar[str] = "weight._scale"
    needs_shapes: ClassVar[bool] = True

    def parse(self, config: Json) -> QuantoSettings:
        names = config.get("modules_to_not_convert") or ()
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise FormatError("quantization_config.modules_to_not_convert is a list of names", found=repr(names)[:80])
        if config.get("qmap") is not None:
            return replace(_parse_map(config["qmap"]), skip=tuple(names))
        activations = config.get("activations")
        return QuantoSettings(
            weights=TYPES[_one_of(TYPES, config.get("weights", "int8"), "weights")],
            activations=NONE if activations is None else TYPES[_one_of(_OF_ACTIVATIONS, activations, "activations")],
            skip=tuple(names),
        )

    def config(self, settings: QuantoSettings) -> dict[str, Any]:
        if settings.by_module:
            stored: dict[str, Any] = {"qmap": {name: _entry(*types) for name, types in settings.by_module}}
        else:
            stored = {"weights": _NAMES[settings.weights], "activations": _NAMES.get(settings.activations)}
        return {"quant_method": "quanto", **stored, "modules_to_not_convert": list(settings.skip) or None}

    def of(self, settings: QuantoSettings, module: str) -> QuantoSettings:
        known = settings.shapes.get(module)
        weights, activations = dict(settings.by_module).get(module, (settings.weights, settings.activations))
        shapes = {} if known is None else {"": known}
        return replace(settings, weights=weights, activations=activations, by_module=(), shapes=shapes)

    def with_shapes(self, settings: QuantoSettings, shapes: Mapping[str, tuple[int, int]]) -> QuantoSettings:
        return replace(settings, shapes=dict(shapes))

    def side_files(
        self, settings: QuantoSettings, weights: Mapping[str, tuple[QuantSpec, tuple[int, int]]]
    ) -> dict[str, Any]:
        return {QMAP: {name: _entry(*_types_of(spec)) for name, (spec, _) in weights.items()}}

    def settings_for(self, spec: QuantSpec) -> QuantoSettings:
        plain = replace(spec, activation=Activation())
        if isinstance(spec.code, FloatCode) and str(spec.code) in ("float8_e4m3fn", "float8_e5m2"):
            weights = f"q{spec.code}"
        elif isinstance(spec.code, IntCode) and spec.bits <= 4:
            weights = "qint2" if spec.bits <= 2 else "qint4"
        elif isinstance(spec.code, IntCode) and spec.zero is None:
            weights = "qint8"
        else:
            raise FormatError("quanto has nothing of the kind", found=plain, expected=", ".join(_CODES))
        whole = spec.zero is None or spec.zero.kind != "additive"
        return QuantoSettings(
            weights=weights,
            activations=_activations_of(spec.activation),
            dtype=spec.dtype,
            whole_zeros=whole and _CODES[weights].bits < 8,
        )

    def spelling(self, settings: QuantoSettings, spec: QuantSpec) -> QuantSpec:
        wanted = self.spec(replace(settings, dtype=spec.dtype))
        # Groups follow from the length of a row, which is not known here.
        return wanted if wanted.bits == 8 else replace(wanted, grouping=spec.grouping)

    def join(self, settings: Mapping[str, QuantoSettings], kept: Collection[str]) -> QuantoSettings:
        first = next(iter(settings.values()))
        types = {name: (own.weights, own.activations) for name, own in settings.items()}
        different = set(types.values()) != {(first.weights, first.activations)}
        return replace(first, skip=tuple(kept), by_module=tuple(types.items()) if different else (), shapes={})

    def spec(self, settings: QuantoSettings) -> QuantSpec:
        return _spec(settings, _LARGEST)

    def spec_for(self, settings: QuantoSettings, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec:
        """The spec of a weight of `shape` and `dtype`, as :meth:`read` gives it."""
        return _spec(replace(settings, dtype=dtype), group_size(settings.weights, shape[1]))

    def expected(self, settings: QuantoSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        dtype = spec.dtype
        layout: TensorLayout = {"input_scale": ((), dtype), "output_scale": ((), dtype)}
        if spec.bits == 8:
            stored = spec.codes_layout(shape)
            return layout | {
                "weight._data": stored,
                "weight._scale": ((shape[0], 1) if shape[0] > 1 else (), dtype),
            }
        rows, cols = _grouped(spec.grouping, shape)
        zero = spec.zero.dtype if spec.zero and spec.zero.kind == "additive" else torch.uint8
        return layout | {
            "weight._data._data": ((-(-rows * spec.bits // 8), cols), torch.uint8),
            "weight._scale": ((rows, 1), dtype),
            "weight._shift": ((rows, 1), zero),
        }

    def read(self, settings: QuantoSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        require_tensors(tensors, ("weight._scale",))
        scale = tensors["weight._scale"]
        require_tensor("weight._scale", scale, dtypes=_FLOATS)
        settings = replace(settings, dtype=scale.dtype)
        tensor = _read_bytes(settings, tensors) if _CODES[settings.weights].bits == 8 else _read_bits(settings, tensors)
        own = dict(tensor.tensors)
        for name in tensor.spec.activation.tensors():
            require_tensors(tensors, (name,))
            require_tensor(name, tensors[name], shape=(), dtypes=(scale.dtype,))
            own[name] = tensors[name].reshape(1)
        return QuantTensor(tensor.spec, own, tensor.shape).validate()

    def write(self, settings: QuantoSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        spec, shape, own = tensor.spec, tensor.shape, tensor.tensors
        if reason := self.refusal(settings, spec, shape):
            raise FormatError(f"quanto can't spell this weight: {reason}", found=spec)
        one = torch.ones((), dtype=spec.dtype, device=tensor.device)
        written = {
            name: own[name].reshape(()) if name in own else one.clone() for name in ("input_scale", "output_scale")
        }
        if spec.bits == 8:
            scale = own["scales"] if shape[0] > 1 else own["scales"].reshape(())
            return written | {"weight._data": own["codes"], "weight._scale": scale}
        rows, cols = _grouped(spec.grouping, shape)
        values = decode_codes(spec, own, shape).reshape(rows, cols)
        zeros = decode_zeros(spec, own, shape)
        shift = torch.zeros_like(own["scales"]) if zeros is None else zeros
        return written | {
            "weight._data._data": _pack(values, spec.bits),
            "weight._scale": own["scales"].reshape(rows, 1),
            "weight._shift": (-shift if shift.is_floating_point() else shift).reshape(rows, 1),
        }

    def check_names(self, others: Collection[str]) -> None:
        if rounded := next((name for name in others if name.endswith(".output_scale")), None):
            raise FormatError(
                "the outputs of a layer that holds no packed weight are rounded, which is not supported",
                tensor=rounded,
                expected="activations of packed linear layers only",
            )

    def refusal(self, settings: QuantoSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        types = _types_or_none(spec)
        if types is None:
            return f"quanto has {', '.join(_CODES)}"
        whole = spec.zero is not None and spec.zero.kind == "integer"
        named = QuantoSettings(*types, dtype=spec.dtype, whole_zeros=whole)
        size = group_size(types[0], shape[1])
        wanted = _spec(named, size)
        if replace(spec, grouping=wanted.grouping) != wanted:
            return f"quanto holds '{wanted}'"
        if (
            spec.grouping.counts(shape) != wanted.grouping.counts(shape)
            or spec.grouping.linear
            or spec.grouping.permuted
        ):
            return f"quanto has {wanted.grouping} in rows of {shape[1]}, not {spec.grouping}"
        if whole and spec.dtype == torch.bfloat16 and (size, spec.bits) == (_LARGEST, 4):
            return "quanto's kernel for bfloat16 in groups of 128 wants real zero points"
        return None


# ------------------------------------------------------------------------------------------------------------ config


def _one_of(allowed: Collection[str], value: object, name: str) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise FormatError(f"quantization_config.{name} is out of range", found=repr(value)[:80], expected=list(allowed))
    return value


def _parse_map(qmap: object) -> QuantoSettings:
    if not isinstance(qmap, Mapping) or not qmap:
        raise FormatError("the map of quantized modules has to be a non-empty object", found=repr(qmap)[:80])
    types = {str(name): _parse_entry(str(name), entry) for name, entry in qmap.items()}
    first = next(iter(types.values()))
    if all(entry == first for entry in types.values()):
        return QuantoSettings(*first)
    return QuantoSettings(*first, by_module=tuple(types.items()))


def _parse_entry(module: str, entry: object) -> tuple[str, str]:
    if not isinstance(entry, Mapping):
        raise FormatError("a module's types are an object", tensor=module, found=repr(entry)[:80])
    weights, activations = (_parse_type(entry.get(name, NONE)) for name in ("weights", "activations"))
    if weights == NONE:
        raise FormatError(
            "the outputs of a layer that is not linear are quantized, which is not supported",
            tensor=module,
            found=repr(activations)[:80],
            expected="activations of linear layers only",
        )
    if weights not in _CODES:
        raise FormatError("unknown type of weights", tensor=module, found=repr(weights)[:80], expected=list(_CODES))
    allowed = [NONE, *(TYPES[name] for name in _OF_ACTIVATIONS)]
    if activations not in allowed:
        raise FormatError("unknown type of activations", tensor=module, found=repr(activations)[:80], expected=allowed)
    return weights, activations


def _parse_type(value: object) -> str:
    """The name of a type; ``qfloat8`` is another one of e4m3, and what is no text is no type."""
    return "qfloat8_e4m3fn" if value == "qfloat8" else value if isinstance(value, str) else repr(value)


def _entry(weights: str, activations: str) -> dict[str, str]:
    return {"weights": weights, "activations": activations}


# -------------------------------------------------------------------------------------------------------------- specs


def _spec(settings: QuantoSettings, size: int | None) -> QuantSpec:
    code, dtype = _CODES[settings.weights], settings.dtype
    zero = None
    if code.bits < 8:
        zero = Zero("integer", code.bits) if settings.whole_zeros else Zero("additive", dtype=dtype)
    grouping = Grouping.groups(size) if size and code.bits < 8 else Grouping.per_channel()
    return QuantSpec(
        code=code,
        scale=Scale(dtype),
        grouping=grouping,
        zero=zero,
        activation=_activation(settings),
        dtype=dtype,
        rounding="each" if zero is not None and zero.kind == "additive" else "once",
    )


def _activation(settings: QuantoSettings) -> Activation:
    if settings.activations == NONE:
        return Activation()
    return Activation(
        "static",
        number=str(_CODES[settings.activations]),
        per="tensor",
        scale_dtype=settings.dtype,
        rounding="each",
        outputs=True,
    )


def _activations_of(activation: Activation) -> str:
    if activation.kind == "none":
        return NONE
    found = next((name for name, code in _CODES.items() if str(code) == activation.number and code.bits == 8), None)
    wanted = _activation(QuantoSettings(activations=found or "qint8", dtype=activation.scale_dtype))
    if found is None or activation != wanted:
        raise FormatError("quanto rounds inputs and outputs by stored scales", found=activation, expected=wanted)
    return found


def _types_or_none(spec: QuantSpec) -> tuple[str, str] | None:
    try:
        return _types_of(spec)
    except FormatError:
        return None


def _types_of(spec: QuantSpec) -> tuple[str, str]:
    weights = next((name for name, code in _CODES.items() if code == spec.code), None)
    if weights is None:
        raise FormatError("quanto has no such codes", found=spec, expected=", ".join(_CODES))
    return weights, _activations_of(spec.activation)


def _grouped(grouping: Grouping, shape: tuple[int, int]) -> tuple[int, int]:
    """The sides of the weight with a group in each row."""
    groups = grouping.counts(shape)[1]
    return shape[0] * groups, shape[1] // groups


# ------------------------------------------------------------------------------------------------------------ tensors


def _read_bytes(settings: QuantoSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
    require_tensors(tensors, ("weight._data",))
    data, scale = tensors["weight._data"], tensors["weight._scale"]
    spec = _spec(settings, None)
    require_tensor("weight._data", data, dtypes=(spec.codes_layout((1, 1))[1],), dims=2)
    shape = (data.shape[0], data.shape[1])
    # A single row's scale is quantized along no axis at all.
    require_tensor("weight._scale", scale, shape=() if shape[0] == 1 and scale.dim() == 0 else (shape[0], 1))
    return QuantTensor(spec, {"codes": data.contiguous(), "scales": scale.reshape(-1, 1)}, shape)


def _read_bits(settings: QuantoSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
    require_tensors(tensors, ("weight._data._data", "weight._shift"))
    packed, scale, shift = (tensors[f"weight.{name}"] for name in ("_data._data", "_scale", "_shift"))
    require_tensor("weight._data._data", packed, dtypes=(torch.uint8,), dims=2)
    require_tensor("weight._scale", scale, dims=2)
    shape = settings.shapes.get("") or _shape_of(settings, packed, scale)
    spec = _spec(settings, group_size(settings.weights, shape[1]))
    whole = not shift.is_floating_point()
    if whole:
        spec = _spec(replace(settings, whole_zeros=True), group_size(settings.weights, shape[1]))
    rows, cols = _grouped(spec.grouping, shape)
    require_tensor("weight._data._data", packed, shape=(-(-rows * spec.bits // 8), cols))
    require_tensor("weight._scale", scale, shape=(rows, 1))
    require_tensor(
        "weight._shift", shift, shape=(rows, 1), dtypes=(torch.uint8, torch.int8) if whole else (scale.dtype,)
    )
    if whole and (int(shift.min()) < 0 or int(shift.max()) >= 1 << spec.bits):
        raise FormatError(
            "a zero point is out of range",
            tensor="weight._shift",
            found=f"{int(shift.min())}..{int(shift.max())}",
            expected=f"0..{(1 << spec.bits) - 1}",
        )
    counts = spec.grouping.counts(shape)
    zeros = shift.reshape(counts)
    values = _unpack(packed, spec.bits, rows).reshape(shape)
    own = {
        "codes": pack(values, spec.bits),
        "scales": scale.reshape(counts),
        "zeros": pack(zeros, spec.bits) if whole else -zeros,
    }
    return QuantTensor(spec, own, shape)


def _shape_of(settings: QuantoSettings, packed: Tensor, scale: Tensor) -> tuple[int, int]:
    """The weight's shape where the stored tensors leave no choice: rows that are their own groups."""
    rows, cols = scale.shape[0], packed.shape[1]
    grouped = cols in range(_STEP, _LARGEST + 1, _STEP)
    if grouped or group_size(settings.weights, cols) is not None:
        raise FormatError(
            "quanto doesn't store how long the rows of a weight of 2 or 4 bits are, and nobody else has said",
            tensor="weight._data._data",
            found=f"{rows} groups of {cols}",
            expected="a config.json of a model that Transformers knows",
        )
    return rows, cols


def _pack(values: Tensor, bits: int) -> Tensor:
    """Rows into bytes, the first ones into the lowest bits."""
    rows = -(-len(values) * bits // 8)
    packed = values.new_zeros((rows, values.shape[1]))
    for part, rows_of_part in enumerate(values.split(rows)):
        packed[: len(rows_of_part)] |= rows_of_part << bits * part
    return packed


def _unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    values = packed.new_empty((len(packed) * 8 // bits, packed.shape[1]))
    for part, rows_of_part in enumerate(values.split(len(packed))):
        rows_of_part.copy_(packed >> bits * part & (1 << bits) - 1)
    return values[:rows]
