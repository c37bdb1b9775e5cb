"""What torchao's configs mean: JSON objects ``{"_type": class, "_version": number, "_data": fields}``.

torchao looks the class up in its modules and calls it. Here it is one of a few names, and is translated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from lowbit.core import Activation, Code, FloatCode, IntCode, dtypes
from lowbit.errors import FormatError
from lowbit.wire.base import Json

Mapped = Literal["symmetric", "asymmetric", "symmetric_no_clipping_err"]
INT4: Final = "Int4Tensor"
INT8: Final = "Int8Tensor"
FLOAT8: Final = "Float8Tensor"
INTX: Final = "IntxUnpackedToInt8Tensor"

_FLOAT8S: Final = {name: dtypes.FLOAT8S[name] for name in ("float8_e4m3fn", "float8_e5m2")}
_MAPPINGS: Final[dict[str, Mapped]] = {
    "symmetric": "symmetric",
    "asymmetric": "asymmetric",
    "symmetric_no_clipping_err": "symmetric_no_clipping_err",
}
_EPS: Final = torch.finfo(torch.float32).eps
AUTO_KERNEL: Final = {"_type": "KernelPreference", "_data": "AUTO"}
_MAX_GROUP: Final = 1 << 30

# Fields and defaults of the configs that are known, as torchao 0.18 stores them.
_ROW: Final = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
SYMMETRIC: Final = {"_type": "MappingType", "_data": "SYMMETRIC"}
_INTX_CHOICES: Final = {
    "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
    "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
}


def stored_dtype(name: str) -> dict[str, str]:
    """A dtype as torchao stores it."""
    return {"_type": "torch.dtype", "_data": name}


def _group(size: int) -> dict[str, Any]:
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}


_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "Int4WeightOnlyConfig": {
        "group_size": 128,
        "set_inductor_config": True,
        "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "PLAIN"},
        "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
        "int4_tile_packed_ntile": 8,
    },
    "Int8WeightOnlyConfig": {"group_size": None, "granularity": _ROW, "set_inductor_config": True},
    "Int8DynamicActivationInt8WeightConfig": {
        "act_mapping_type": SYMMETRIC,
        "weight_only_decode": False,
        "granularity": _ROW,
        "set_inductor_config": True,
        "reduce_range": False,
    },
    "Float8WeightOnlyConfig": {
        "weight_dtype": stored_dtype("float8_e4m3fn"),
        "set_inductor_config": True,
        "granularity": _ROW,
    },
    "Float8DynamicActivationFloat8WeightConfig": {
        "activation_dtype": stored_dtype("float8_e4m3fn"),
        "weight_dtype": stored_dtype("float8_e4m3fn"),
        "granularity": [{"_type": "PerTensor", "_version": 1, "_data": {}}] * 2,
        "packing_format": {"_type": "Float8PackingFormat", "_data": "PLAIN"},
        "mm_config": {
            "_type": "Float8MMConfig",
            "_version": 1,
            "_data": {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False},
        },
        "activation_value_lb": None,
        "activation_value_ub": None,
        "kernel_preference": AUTO_KERNEL,
        "set_inductor_config": True,
        "alg_id": 0,
    },
    "IntxWeightOnlyConfig": {
        "weight_dtype": stored_dtype("int8"),
        "granularity": {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}},
        "mapping_type": SYMMETRIC,
        "scale_dtype": None,
        **_INTX_CHOICES,
    },
    "Int8DynamicActivationIntxWeightConfig": {
        "weight_dtype": stored_dtype("int8"),
        "weight_granularity": _group(32),
        "weight_mapping_type": SYMMETRIC,
        "weight_scale_dtype": None,
        "act_mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
        **_INTX_CHOICES,
    },
}
TYPES: Final = tuple(_DEFAULTS)
_VERSION: Final = 2

# The names of Transformers 4, and the arguments that they took.
_OLD_NAMES: Final = {
    "int4_weight_only": "Int4WeightOnlyConfig",
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
}
_OLD_ARGUMENTS: Final[dict[str, tuple[str, ...]]] = {
    "int4_weight_only": ("group_size", "inner_k_tiles"),
    "int8_weight_only": ("group_size",),
    "int8_dynamic_activation_int8_weight": (),
}


@dataclass(frozen=True)
class AoConfig:
    """One of torchao's configs, understood.

    Attributes:
        text: the config as canonical JSON.
        kind: the class of the tensors that it makes.
        code: signed, whatever the mapping.
        rows: of a block of weights with one scale; 0 for all.
        cols: likewise.
        mapping: how integers are mapped.
        fitted: whether scales are chosen by least squares.
        scale_dtype: of the scales, None for the weight's own.
        reduced: whether codes of 8 bits keep to 7.
    """

    text: str
    kind: str
    code: Code
    rows: int
    cols: int
    mapping: Mapped = "symmetric"
    fitted: bool = False
    scale_dtype: torch.dtype | None = None
    reduced: bool = False
    activation: Activation = field(default_factory=Activation)

    @property
    def data(self) -> dict[str, Any]:
        """The config as it is stored."""
        data: dict[str, Any] = json.loads(self.text)
        return data


def config_named(name: str, **fields: Any) -> AoConfig:
    """The config `name` with some of its fields other than by default, each as it is stored."""
    return parse_config({"_type": name, "_version": _VERSION, "_data": fields})


def old_config(name: object, arguments: object) -> AoConfig:
    """The config that Transformers 4 called by a text and arguments.

    Raises:
        FormatError: an unknown name, or an argument that it doesn't take.
    """
    if not isinstance(name, str) or name not in _OLD_NAMES:
        raise FormatError("unknown quant_type of torchao", found=repr(name)[:80], expected=sorted(_OLD_NAMES))
    if not isinstance(arguments, Mapping):
        raise FormatError("quant_type_kwargs is an object", found=repr(arguments)[:80])
    allowed = _OLD_ARGUMENTS[name]
    for argument in arguments:
        if argument not in allowed:
            raise FormatError(f"'{name}' takes no argument '{argument}'"[:200], expected=list(allowed))
    size = arguments.get("group_size")
    if size is None:
        return config_named(_OLD_NAMES[name])
    if name == "int8_weight_only":
        return config_named(_OLD_NAMES[name], granularity=_group(size))
    return config_named(_OLD_NAMES[name], group_size=size)


def parse_config(data: object) -> AoConfig:
    """Translate a stored config.

    Raises:
        FormatError: a class that is not known, an unknown field, or a value out of range.
    """
    name, given = parse_object(data, "quant_type")
    if name not in _DEFAULTS:
        raise FormatError("quant_type names a class that lowbit doesn't know", found=name[:80], expected=list(TYPES))
    version = data.get("_version", 1) if isinstance(data, Mapping) else 1
    if version != _VERSION:
        raise FormatError(
            f"version {version!r} of {name} wrote pickled files only; load it with the torchao of its time and save it "
            "with a new one",
            found=version,
            expected=_VERSION,
        )
    defaults = _DEFAULTS[name]
    if unknown := sorted(map(str, set(given) - set(defaults))):
        raise FormatError(f"{name} has unknown fields", found=unknown[:8], expected=sorted(defaults))
    fields = {**defaults, **given}
    text = json.dumps({"_type": name, "_version": _VERSION, "_data": fields}, sort_keys=True, separators=(",", ":"))
    return _READERS[name](text, fields)


def _int4(text: str, fields: Json) -> AoConfig:
    choice(fields, "int4_packing_format", "plain")
    choice(fields, "int4_choose_qparams_algorithm", "tinygemm")
    return AoConfig(text, INT4, IntCode(4, signed=True), 1, _size(fields["group_size"], "group_size"))


def _int8(text: str, fields: Json) -> AoConfig:
    if fields["group_size"] is not None:
        raise FormatError(
            "Int8WeightOnlyConfig.group_size belongs to version 1", found=fields["group_size"], expected="a granularity"
        )
    rows, cols = granularity(fields["granularity"])
    return AoConfig(text, INT8, IntCode(8, signed=True), rows, cols)


def _int8_dynamic(text: str, fields: Json) -> AoConfig:
    inputs, weights = _both(fields["granularity"])
    reduced = flag(fields["reduce_range"], "reduce_range")
    policy = int8_policy(inputs, choice(fields, "act_mapping_type", "symmetric", "asymmetric"), reduced)
    return AoConfig(text, INT8, IntCode(8, signed=True), *weights, reduced=reduced, activation=policy)


def _float8(text: str, fields: Json) -> AoConfig:
    rows, cols = granularity(fields["granularity"])
    return AoConfig(text, FLOAT8, FloatCode(float8_dtype(fields["weight_dtype"])), rows, cols)


def _float8_dynamic(text: str, fields: Json) -> AoConfig:
    choice(fields, "packing_format", "plain")
    inputs, weights = _both(fields["granularity"] or [{"_type": "PerTensor", "_data": {}}] * 2)
    policy = float8_policy(
        inputs, float8_dtype(fields["activation_dtype"]), fields["activation_value_lb"], fields["activation_value_ub"]
    )
    return AoConfig(text, FLOAT8, FloatCode(float8_dtype(fields["weight_dtype"])), *weights, activation=policy)


def _intx(text: str, fields: Json, prefix: str = "") -> AoConfig:
    choice(fields, "intx_packing_format", "unpacked_to_int8")
    bits = integer_bits(fields["weight_dtype"])
    mapping = _MAPPINGS[choice(fields, f"{prefix}mapping_type", *_MAPPINGS)]
    fitted = choice(fields, "intx_choose_qparams_algorithm", "affine", "hqq_scale_only") == "hqq_scale_only"
    if fitted and mapping == "asymmetric":
        mapping = "symmetric"  # hqq_scale_only has no zero points whatever is said
    if bits == 1 and mapping == "symmetric_no_clipping_err":
        raise FormatError("one bit has no positive number to reach without clipping", found=mapping)
    rows, cols = granularity(fields[f"{prefix}granularity"])
    if rows != 1:
        raise FormatError("intx has groups along rows", found=fields[f"{prefix}granularity"])
    spelled = fields[f"{prefix}scale_dtype"]
    scale_dtype = None if spelled is None else dtypes.parse(tagged(spelled, "torch.dtype"))
    return AoConfig(text, INTX, IntCode(bits, signed=True), rows, cols, mapping, fitted, scale_dtype)


def _intx_dynamic(text: str, fields: Json) -> AoConfig:
    choice(fields, "act_mapping_type", "asymmetric")
    plain = _intx(text, fields, "weight_")
    return AoConfig(**{**vars(plain), "activation": PER_TOKEN})


_READERS: Final = {
    "Int4WeightOnlyConfig": _int4,
    "Int8WeightOnlyConfig": _int8,
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "Float8WeightOnlyConfig": _float8,
    "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
    "IntxWeightOnlyConfig": _intx,
    "Int8DynamicActivationIntxWeightConfig": _intx_dynamic,
}

# ------------------------------------------------------------------------------------------------------- activations

# int8_asym_per_token: every operation in the dtype of the inputs.
PER_TOKEN: Final = Activation("dynamic", number="int8", symmetric=False, rounding="each", reciprocal=True)


def int8_policy(block: tuple[int, int], mapping: str, reduced: bool) -> Activation:
    """Inputs as int8, 7 bits of it where `reduced`, per token or tensor."""
    per = {(1, 0): "token", (0, 0): "tensor"}.get(block)
    if per is None:
        raise FormatError("int8 activations have a scale per row or tensor", found=list(block))
    return Activation(
        "dynamic",
        number="int7" if reduced else "int8",
        per=per,  # type: ignore[arg-type]
        symmetric=mapping == "symmetric",
        divisor=(63.5 if reduced else 127.5) if mapping == "symmetric" else 0.0,
        floor=_EPS,
        rounding="scale",
        reciprocal=True,
    )


def float8_policy(block: tuple[int, int], number: torch.dtype, least: object, most: object) -> Activation:
    """Inputs as FP8 per token, tensor or group; `least` and `most` bound their absolute maxima."""
    per = {(1, 0): "token", (0, 0): "tensor"}.get(block, "group" if block[0] == 1 else None)
    if per is None:
        raise FormatError("FP8 activations have a scale per row, tensor or group of a row", found=list(block))
    bounds = [0.0 if bound is None else bound for bound in (least, most)]
    if not all(type(bound) in (int, float) and 0 <= bound < float("inf") for bound in bounds):  # type: ignore[operator]
        raise FormatError("bounds of activations are positive numbers", found=repr((least, most))[:80])
    return Activation(
        "dynamic",
        number=dtypes.name_of(number),
        per=per,  # type: ignore[arg-type]
        size=block[1] if per == "group" else 0,
        bound=float(bounds[1]),  # type: ignore[arg-type]
        floor=float(bounds[0]) / torch.finfo(number).max,  # type: ignore[arg-type]
        rounding="scale",
    )


# ------------------------------------------------------------------------------------------------ values of a config


def granularity(value: object) -> tuple[int, int]:
    """Rows and columns of a block of weights that share a scale, 0 for all."""
    name, fields = parse_object(value, "granularity")
    if name == "PerTensor":
        return 0, 0
    if name == "PerRow" and fields.get("dim", -1) in (-1, 1):
        return 1, 0
    if name == "PerAxis" and fields.get("axis") == 0:
        return 1, 0
    if name == "PerGroup":
        return 1, _size(fields.get("group_size"), "group_size")
    if name == "PerBlock":
        return block_of(fields.get("block_size"))
    raise FormatError(
        "unknown granularity",
        found=repr(value)[:120],
        expected="PerTensor, PerRow, PerAxis of axis 0, PerGroup or PerBlock",
    )


def granularity_of(rows: int, cols: int) -> dict[str, Any]:
    """A block as torchao stores it; the inverse of :func:`granularity`."""
    if (rows, cols) == (0, 0):
        return {"_type": "PerTensor", "_version": 1, "_data": {}}
    if (rows, cols) == (1, 0):
        return _ROW
    if rows == 1:
        return _group(cols)
    return {"_type": "PerBlock", "_version": 1, "_data": {"block_size": [rows, cols]}}


def block_of(value: object) -> tuple[int, int]:
    """A stored block size.

    Raises:
        FormatError: not two positive integers.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise FormatError("block_size has a number of rows and one of columns", found=repr(value)[:80])
    return _size(value[0], "block_size"), _size(value[1], "block_size")


def integer_bits(value: object) -> int:
    """Of a stored ``int1`` to ``int8``."""
    spelled = tagged(value, "torch.dtype")
    names = {f"int{bits}": bits for bits in range(1, 9)}
    if spelled not in names:
        raise FormatError("weights are int1 to int8", found=repr(spelled)[:80])
    return names[spelled]


def float_dtype(value: object) -> torch.dtype:
    """A stored dtype of dense weights."""
    return dtypes.parse(tagged(value, "torch.dtype"), {**dtypes.FLOATS})


def float8_dtype(value: object) -> torch.dtype:
    """A stored dtype of FP8 numbers."""
    return dtypes.parse(tagged(value, "torch.dtype"), _FLOAT8S)


def _both(value: object) -> tuple[tuple[int, int], tuple[int, int]]:
    """Granularities of activations and weights, which may be one."""
    if not isinstance(value, list):
        return granularity(value), granularity(value)
    if len(value) != 2:
        raise FormatError("granularity is one or two", found=repr(value)[:120])
    return granularity(value[0]), granularity(value[1])


def parse_object(value: object, what: str) -> tuple[str, dict[str, Any]]:
    """The class and the fields of a stored object."""
    if not isinstance(value, Mapping) or not isinstance(value.get("_type"), str):
        raise FormatError(f"{what} is an object with _type and _data", found=repr(value)[:120])
    fields = value.get("_data", {})
    if not isinstance(fields, Mapping):
        raise FormatError(f"{what}: _data is an object", found=repr(fields)[:120])
    return value["_type"], dict(fields)


def tagged(value: object, kind: str) -> Any:
    """The text in an object of the class `kind`."""
    if not isinstance(value, Mapping) or value.get("_type") != kind or not isinstance(value.get("_data"), str):
        raise FormatError(f"a value is not a {kind}", found=repr(value)[:120])
    return value["_data"]


def choice(fields: Json, name: str, *allowed: str) -> str:
    """One of an enumeration, which is stored as an object or as a text."""
    value = fields[name]
    spelled = value.get("_data") if isinstance(value, Mapping) else value
    found = spelled.lower() if isinstance(spelled, str) else None
    if found not in allowed:
        raise FormatError(f"{name} is one that lowbit doesn't do", found=repr(spelled)[:80], expected=list(allowed))
    return found


def _size(value: object, what: str) -> int:
    if type(value) is not int or not 0 < value < _MAX_GROUP:
        raise FormatError(f"{what} is a positive integer", found=repr(value)[:80])
    return value


def flag(value: object, what: str) -> bool:
    """A truth value, false where there is none."""
    if value is not None and type(value) is not bool:
        raise FormatError(f"{what} is true or false", found=repr(value)[:80])
    return bool(value)
