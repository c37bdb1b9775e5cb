"""What a compressed-tensors configuration says: schemes, presets, and which of them a module has.

The names and the meaning of the keys are those of the library's ``QuantizationConfig``, ``QuantizationScheme`` and
``QuantizationArgs``, of all its versions: newer ones refuse ``actorder: group`` and don't know ``sparsity_config``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch

from lowbit.core import dtypes
from lowbit.errors import FormatError
from lowbit.wire.base import Json, field

STRATEGIES: Final = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
QUANTIZED: Final = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
SPARSE: Final = ("sparse-bitmask", "sparse-24-bitmask")
# What a whole checkpoint may be declared as where its schemes or its tensors say more.
UNSPECIFIC: Final = ("dense", "fakequant", "mixed-precision", *SPARSE)
_ARGS: Final = frozenset(
    {
        "num_bits",
        "type",
        "symmetric",
        "group_size",
        "strategy",
        "block_structure",
        "dynamic",
        "actorder",
        "scale_dtype",
        "zp_dtype",
        "observer",
        "observer_kwargs",
    }
)
_SCHEME: Final = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_GROUP_LIMIT: Final = 1 << 24  # more input features than any layer has


@dataclass(frozen=True)
class Args:
    """How weights, inputs or outputs are quantized.

    Attributes:
        kind: ``int`` or ``float``: with 8 bits e4m3, 6 bits e2m3, 4 bits e2m1.
        group: columns that share a scale under the strategies ``group`` and ``tensor_group``, else 0.
        block: rows and columns that do under the strategy ``block``.
        dynamic: ``no``, ``yes``, or ``local``: below a stored global scale.
        actorder: whether a group index is stored with the weight (``actorder: group``).
        scale_dtype: ``torch.uint8`` for the exponents of the microscaling formats, ``torch.float8_e4m3fn`` for NVFP4.
    """

    bits: int = 8
    kind: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group: int = 0
    block: tuple[int, int] = (0, 0)
    dynamic: Literal["no", "yes", "local"] = "no"
    actorder: bool = False
    scale_dtype: torch.dtype | None = None

    @property
    def exponents(self) -> bool:
        """Whether the scales are powers of two (MXFP4, MXFP6, MXFP8)."""
        return self.kind == "float" and self.group == 32 and (self.bits < 8 or self.scale_dtype == torch.uint8)

    def to_dict(self) -> dict[str, Any]:
        """As the library writes it."""
        data: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "group_size": self.group or None,
            "strategy": self.strategy,
            "dynamic": {"no": False, "yes": True}.get(self.dynamic, self.dynamic),
        }
        if self.strategy == "block":
            data["block_structure"] = list(self.block)
        if self.actorder:
            data["actorder"] = "group"
        if self.scale_dtype is not None:
            data["scale_dtype"] = str(self.scale_dtype)
        return data


@dataclass(frozen=True)
class Scheme:
    """What happens to the modules that match one of `targets`: names, ``re:`` expressions, or names of classes."""

    targets: tuple[str, ...] = ("Linear",)
    weights: Args | None = None
    inputs: Args | None = None
    outputs: Args | None = None
    format: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the library writes it."""
        return {
            "targets": list(self.targets),
            "weights": self.weights.to_dict() if self.weights else None,
            "input_activations": self.inputs.to_dict() if self.inputs else None,
            "output_activations": self.outputs.to_dict() if self.outputs else None,
            "format": self.format,
        }

    @property
    def inferred_format(self) -> str:
        """The format that the library chooses for a scheme that names none."""
        weights = self.weights or Args()
        if weights.exponents:
            return {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}[weights.bits]
        if weights.kind == "float" and weights.bits == 4:
            return "nvfp4-pack-quantized"
        if weights.kind == "int":
            return "int-quantized" if self.inputs else "pack-quantized"
        return "float-quantized" if self.inputs else "naive-quantized"


@dataclass(frozen=True)
class Sparsity:
    """That weights are stored without their zeros: ``sparse-bitmask`` or ``sparse-24-bitmask``; no targets: all."""

    format: str
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    structure: str = "unstructured"

    def to_dict(self) -> dict[str, Any]:
        """As the library wrote it."""
        return {
            "format": self.format,
            "targets": list(self.targets) or None,
            "ignore": list(self.ignore) or None,
            "global_sparsity": 0.0,
            "sparsity_structure": self.structure,
        }


def parse_scheme(data: object, where: str) -> Scheme:
    """One entry of ``config_groups``.

    Raises:
        FormatError: a key is unknown, or a value out of range.
    """
    if not isinstance(data, Mapping):
        raise FormatError(f"{where} is not an object", found=repr(data)[:80])
    if unknown := set(data) - _SCHEME:
        raise FormatError(f"{where} has unknown keys", found=sorted(map(str, unknown))[:8], expected=sorted(_SCHEME))
    spelled = data.get("format")
    if spelled is not None and spelled not in (*QUANTIZED, "dense", *SPARSE):
        raise FormatError(f"{where}.format is unknown", found=repr(spelled)[:80], expected=list(QUANTIZED))
    scheme = Scheme(
        targets=names_of(data.get("targets"), f"{where}.targets"),
        weights=parse_args(data.get("weights"), f"{where}.weights"),
        inputs=parse_args(data.get("input_activations"), f"{where}.input_activations"),
        outputs=parse_args(data.get("output_activations"), f"{where}.output_activations"),
        format=spelled,
    )
    if scheme.weights is None and (scheme.inputs or scheme.outputs):
        raise FormatError(
            f"{where} quantizes activations of layers whose weights are dense (attention, for one), which lowbit "
            "doesn't do",
            found=list(scheme.targets),
        )
    if scheme.weights and (scheme.weights.dynamic != "no" or scheme.weights.strategy in ("token", "attn_head")):
        raise FormatError(f"{where}.weights can't be of this kind", found=data["weights"])
    return scheme


def parse_args(data: object, where: str) -> Args | None:
    """A ``QuantizationArgs``; None for none.

    Raises:
        FormatError: a key is unknown, or a value out of range.
    """
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise FormatError(f"{where} is not an object", found=repr(data)[:80])
    if unknown := set(data) - _ARGS:
        raise FormatError(f"{where} has unknown keys", found=sorted(map(str, unknown))[:8], expected=sorted(_ARGS))
    try:
        return _args(data)
    except FormatError as error:
        message = error.message.replace("quantization_config", where)
        raise FormatError(message, found=error.found, expected=error.expected) from error


def _args(data: Json) -> Args:
    kind = _lower(data, "type", "int", ("int", "float"))
    bits = field(data, "num_bits", int, 8, allowed=tuple(range(1, 9)) if kind == "int" else (4, 6, 8))
    size = data.get("group_size")
    if size is not None and (type(size) is not int or not -1 <= size <= _GROUP_LIMIT):
        raise FormatError("quantization_config.group_size is out of range", found=repr(size)[:80], expected="-1 or up")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = _lower(data, "strategy", inferred, STRATEGIES)
    grouped = strategy in ("group", "tensor_group")
    if grouped != (size is not None and size > 0) or (size == 0 and strategy == inferred):
        raise FormatError(
            "quantization_config.group_size doesn't go with the strategy", found=f"{size!r} and {strategy!r}"
        )
    block = _block(data.get("block_structure"))
    if (strategy == "block") != (block is not None):
        raise FormatError(
            "quantization_config.block_structure doesn't go with the strategy", found=f"{block} and {strategy!r}"
        )
    for name in ("scale_dtype", "zp_dtype"):
        if data.get(name) is not None:
            dtypes.parse(data[name], dtypes.ALL)
    dynamic = _dynamic(data.get("dynamic", False))
    if dynamic == "local" and strategy != "tensor_group":
        raise FormatError("quantization_config.dynamic 'local' goes with the strategy 'tensor_group'", found=strategy)
    return Args(
        bits=bits,
        kind="int" if kind == "int" else "float",
        symmetric=field(data, "symmetric", bool, True),
        strategy=strategy,
        group=size if grouped and size is not None else 0,
        block=block or (0, 0),
        dynamic=dynamic,
        actorder=_actorder(data.get("actorder")),
        scale_dtype=dtypes.parse(data["scale_dtype"], dtypes.ALL) if data.get("scale_dtype") is not None else None,
    )


def _lower(data: Json, name: str, default: str, allowed: tuple[str, ...]) -> str:
    """A name in any case; None stands for the default."""
    value = data.get(name)
    value = default if value is None else value
    spelled = value.lower() if isinstance(value, str) else value
    if spelled not in allowed:
        raise FormatError(f"quantization_config.{name} is out of range", found=repr(value)[:80], expected=list(allowed))
    return str(spelled)


def _block(value: object) -> tuple[int, int] | None:
    """``[rows, columns]``, or as text ``RxC``."""
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) and len(value) < 32 else value
    if isinstance(sides, list | tuple) and len(sides) == 2:
        rows, cols = (int(side) if isinstance(side, str) and side.isdecimal() else side for side in sides)
        if type(rows) is int and type(cols) is int and 0 < rows <= _GROUP_LIMIT and 0 < cols <= _GROUP_LIMIT:
            return rows, cols
    raise FormatError(
        "quantization_config.block_structure is out of range", found=repr(value)[:80], expected="[rows, columns]"
    )


def _dynamic(value: object) -> Literal["no", "yes", "local"]:
    if value is True or value is False:
        return "yes" if value else "no"
    if isinstance(value, str) and value.lower() == "local":
        return "local"
    raise FormatError("quantization_config.dynamic is out of range", found=repr(value)[:80], expected="a bool, 'local'")


def _actorder(value: object) -> bool:
    """Whether a group index is stored; ``weight`` leaves no trace in the file."""
    if value is None or isinstance(value, bool):
        return bool(value)
    spelled = value.lower() if isinstance(value, str) else value
    if spelled not in ("weight", "static", "group", "dynamic"):
        raise FormatError(
            "quantization_config.actorder is out of range", found=repr(value)[:80], expected="'weight' or 'group'"
        )
    return spelled in ("group", "dynamic")


def names_of(value: object, where: str) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        FormatError: it is anything else.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise FormatError(f"{where} is not a list of texts", found=repr(value)[:80])
    return tuple(value)


def parse_sparsity(data: object) -> Sparsity | None:
    """A ``sparsity_config``; None where it is empty or says ``dense``.

    Raises:
        FormatError: the format is unknown.
    """
    if not data:
        return None
    if not isinstance(data, Mapping):
        raise FormatError("sparsity_config is not an object", found=repr(data)[:80])
    spelled = data.get("format", "dense")
    if spelled == "dense":
        return None
    if spelled not in SPARSE:
        raise FormatError("sparsity_config.format is unknown", found=repr(spelled)[:80], expected=["dense", *SPARSE])
    structure = data.get("sparsity_structure") or "unstructured"
    if not isinstance(structure, str):
        raise FormatError("sparsity_config.sparsity_structure is not a text", found=repr(structure)[:80])
    return Sparsity(
        spelled,
        names_of(data.get("targets") or (), "sparsity_config.targets"),
        names_of(data.get("ignore") or (), "sparsity_config.ignore"),
        structure,
    )


def _integers(bits: int, activation_bits: int = 16, symmetric: bool = True) -> Scheme:
    inputs = Args(activation_bits, strategy="token", dynamic="yes") if activation_bits < 16 else None
    return Scheme(weights=Args(bits, symmetric=symmetric, strategy="group", group=128), inputs=inputs)


def _mx(bits: int, **changes: Any) -> Args:
    return replace(Args(bits, "float", strategy="group", group=32, scale_dtype=torch.uint8), **changes)


_NVFP4: Final = Args(4, "float", strategy="tensor_group", group=16, scale_dtype=torch.float8_e4m3fn)
_FP8: Final = Args(8, "float")
_FP8_GROUPS: Final = Args(8, "float", strategy="group", group=128, dynamic="yes")
_INT8: Final = Scheme(weights=Args(8, strategy="channel"), inputs=Args(8, strategy="token", dynamic="yes"))

# The names under which the library knows whole schemes.
PRESETS: Final[dict[str, Scheme]] = {
    "UNQUANTIZED": Scheme(),
    "W4A16_ASYM": _integers(4, symmetric=False),
    "W8A8": _INT8,
    "INT8": _INT8,
    "W4AFP8": replace(_integers(4), inputs=Args(8, "float", strategy="token", dynamic="yes")),
    "FP8": Scheme(weights=_FP8, inputs=_FP8),
    "FP8_DYNAMIC": Scheme(
        weights=replace(_FP8, strategy="channel"), inputs=replace(_FP8, strategy="token", dynamic="yes")
    ),
    "FP8_BLOCK": Scheme(weights=replace(_FP8, strategy="block", block=(128, 128)), inputs=_FP8_GROUPS),
    "NVFP4A16": Scheme(weights=_NVFP4),
    "NVFP4": Scheme(weights=_NVFP4, inputs=replace(_NVFP4, dynamic="local")),
    "MXFP4A16": Scheme(weights=_mx(4)),
    "MXFP4": Scheme(weights=_mx(4), inputs=_mx(4, dynamic="yes")),
    "MXFP4XFP8": Scheme(weights=_mx(4), inputs=_FP8_GROUPS),
    "MXFP6A16": Scheme(weights=_mx(6)),
    "MXFP6A8": Scheme(weights=_mx(6), inputs=_mx(8, dynamic="yes")),
    "MXFP8A16": Scheme(weights=_mx(8)),
    "MXFP8": Scheme(weights=_mx(8), inputs=_mx(8, dynamic="yes")),
    **{f"W{bits}A{inputs}": _integers(bits, inputs) for bits, inputs in ((2, 4), (3, 4), (4, 4))},
    **{f"W{bits}A8": _integers(bits, 8) for bits in range(2, 8)},
    **{f"W{bits}A16": _integers(bits) for bits in range(2, 9)},
}


def preset(name: object, targets: Collection[str]) -> Scheme:
    """The preset called `name`, in any case, for these targets.

    Raises:
        FormatError: there is none.
    """
    found = PRESETS.get(name.upper()) if isinstance(name, str) else None
    if found is None:
        raise FormatError("config_groups names an unknown preset", found=repr(name)[:80], expected=sorted(PRESETS))
    return replace(found, targets=tuple(targets))
