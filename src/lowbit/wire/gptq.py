"""GPTQ as AutoGPTQ and GPTQModel write it: 2, 3, 4 or 8 bits packed along the input axis in 32-bit words.

=========== ======================== =================================================================
``qweight``  int32 [in*b/32, out]     codes, least significant bits first, 3-bit values across words
``qzeros``   int32 [groups, out*b/32] zero points; version 1 stores ``zero - 1``, version 2 ``zero``
``scales``   fp16 [groups, out]
``g_idx``    int32 [in]               the group of each input column; absent: ``column // group_size``
=========== ======================== =================================================================

``W[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n])``. In version 1 a zero point of 0 is stored as all ones:
it wraps around and does not become ``2**b``. Two dialects of version 1 differ in the zero point next to such a one.
GPTQModel subtracts 1 from every field of a word at once, so that a field that wraps borrows from the next (2, 4 and
8 bits); it signs its files in ``meta.quantizer``, and so do we, who write as it does. AutoGPTQ's reader, ``cuda_old``,
takes each field for itself; files without that signature are read like that.

``dynamic`` maps expressions over module names to settings of their own, the first that matches at a name's start
decides; ``-:`` before it leaves a module dense. Files that were packed for the Marlin kernel are in
:mod:`lowbit.wire.marlin`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.core import Grouping, QuantSpec, QuantTensor, integer_spec, pack, patterns, unpack
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError, SpecError
from lowbit.wire import marlin
from lowbit.wire.base import (
    Json,
    Wire,
    as_bytes,
    as_words,
    bits_for,
    field,
    group_size_for,
    group_size_of,
    require_tensor,
    require_tensors,
    scale_dtype_for,
)

BITS = (2, 3, 4, 8)
_LAYOUT = ("bits", "group_size", "sym", "desc_act")  # what `dynamic` may change that files depend on
# exllama and ipex are names of kernels, for which nothing was packed in another way.
_VERSIONS = {"gptq": 1, "gptq_v2": 2, "marlin": 1, "exllama": 1, "exllamav2": 1, "ipex": 1}
SIGNATURE = {"quantizer": ["lowbit"]}
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class GptqSettings:
    """What ``config.json`` (or AutoGPTQ's ``quantize_config.json``) says.

    Attributes:
        version: 1 for ``checkpoint_format: gptq``, 2 for ``gptq_v2``.
        borrows: in version 1, whether the writer subtracted 1 from whole words.
        marlin: whether weights are packed for the Marlin kernel.
        rules: ``dynamic``: expressions over module names as they are spelled, each with the settings of the modules
            that it matches, None where they stay dense.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True
    desc_act: bool = False
    version: int = 1
    borrows: bool = True
    marlin: bool = False
    rules: tuple[tuple[str, GptqSettings | None], ...] = ()

    def rule_of(self, module: str) -> tuple[str, GptqSettings | None] | None:
        """The first rule that matches a module, or None."""
        return next((rule for rule in self.rules if patterns.match(_expression(rule[0]), module)), None)


class GptqWire(Wire[GptqSettings]):
    """Both versions of GPTQ, and the layout of Marlin."""

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx", *marlin.SUFFIXES)
    marker: ClassVar[str] = "qweight"

    def modules(self, names: Collection[str]) -> list[str]:
        endings = (f".{self.marker}", f".{marlin.SUFFIXES[0]}")
        return [name.rpartition(".")[0] for name in names if name.endswith(endings)]

    def parse(self, config: Json) -> GptqSettings:
        spelled = _format_of(config)
        if not isinstance(spelled, str) or spelled not in _VERSIONS:
            raise FormatError("unknown GPTQ checkpoint format", found=repr(spelled)[:80], expected=sorted(_VERSIONS))
        settings = GptqSettings(
            bits=field(config, "bits", int, allowed=BITS),
            group_size=group_size_of(config, "group_size"),
            symmetric=field(config, "sym", bool, True),
            desc_act=field(config, "desc_act", bool, False),
            version=_VERSIONS[spelled],
            borrows=_writer_borrows(config.get("meta")),
            marlin=spelled == "marlin",
        )
        return replace(settings, rules=self._rules(config))

    def _rules(self, config: Json) -> tuple[tuple[str, GptqSettings | None], ...]:
        dynamic = field(config, "dynamic", dict, {}) if config.get("dynamic") is not None else {}
        rules = []
        for pattern, changes in dynamic.items():
            try:
                patterns.match(_expression(pattern), "")
            except SpecError as error:
                raise FormatError(f"quantization_config.dynamic: {error}", found=repr(pattern)[:80]) from error
            if not isinstance(changes, Mapping):
                raise FormatError("quantization_config.dynamic maps expressions to objects", found=repr(changes)[:80])
            own = {key: changes[key] for key in _LAYOUT if key in changes}
            kept = pattern.startswith("-:")
            rules.append((pattern, None if kept else self.parse({**config, **own, "dynamic": None})))
        return tuple(rules)

    def of(self, settings: GptqSettings, module: str) -> GptqSettings:
        rule = settings.rule_of(module)
        return rule[1] if rule and rule[1] else replace(settings, rules=())

    def settings_for(self, spec: QuantSpec) -> GptqSettings:
        return GptqSettings(
            bits=bits_for(spec, BITS),
            group_size=group_size_for(spec),
            symmetric=spec.zero is None,
            desc_act=spec.grouping.permuted,
        )

    def vary(self, settings: GptqSettings, variant: str) -> GptqSettings:
        variants: dict[str, dict[str, Any]] = {"v1": {"version": 1}, "v2": {"version": 2}, "marlin": {"marlin": True}}
        if variant not in variants:
            raise FormatError("unknown variant of GPTQ", found=variant, expected=sorted(variants))
        return replace(settings, **variants[variant])

    def spelling(self, settings: GptqSettings, spec: QuantSpec) -> QuantSpec:
        permuted = spec.grouping.permuted and settings.group_size == spec.grouping.cols
        return integer_spec(settings.bits, settings.group_size, permuted=permuted, scale_dtype=scale_dtype_for(spec))

    def join(self, settings: Mapping[str, GptqSettings], kept: Collection[str]) -> GptqSettings:
        common = Counter(settings.values()).most_common(1)[0][0]
        comparable = {(own.version, own.borrows, own.marlin) for own in settings.values()}
        if len(comparable) > 1:
            raise FormatError("a checkpoint has one version of GPTQ", found=sorted(comparable), expected="one")
        # Readers look for packed layers in the blocks only; heads are none of them.
        inside = [name for name in kept if "." in name]
        rules: list[tuple[str, GptqSettings | None]] = [(f"-:^{re.escape(name)}$", None) for name in inside]
        rules += [(f"+:^{re.escape(name)}$", own) for name, own in settings.items() if own != common]
        return replace(common, rules=tuple(rules))

    def config(self, settings: GptqSettings) -> dict[str, Any]:
        spelled = "marlin" if settings.marlin else "gptq" if settings.version == 1 else "gptq_v2"
        return {
            "quant_method": "gptq",
            **_layout_of(settings),
            "checkpoint_format": spelled,
            **({"meta": SIGNATURE} if settings.borrows else {}),
            **({"dynamic": {name: _layout_of(own) for name, own in settings.rules}} if settings.rules else {}),
        }

    def spec(self, settings: GptqSettings) -> QuantSpec:
        # Whether desc_act left a permutation is in the tensors: a sorted g_idx is none.
        return integer_spec(settings.bits, settings.group_size)

    def expected(self, settings: GptqSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        out_features, in_features = shape
        groups = spec.grouping.counts(shape)[1]
        if settings.marlin:
            return marlin.layout(shape, groups)
        return {
            "qweight": ((in_features * spec.bits // 32, out_features), torch.int32),
            "qzeros": ((groups, out_features * spec.bits // 32), torch.int32),
            "scales": ((groups, out_features), spec.scale.dtype),
            "g_idx": ((in_features,), torch.int32),
        }

    def read(self, settings: GptqSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        if "B" in tensors:
            return self._read_marlin(settings, tensors)
        settings = replace(settings, marlin=False)  # some name the kernel there that shall run the plain layout
        require_tensors(tensors, ("qweight", "qzeros", "scales"))
        shape = self._shape(settings, tensors["qweight"])
        scales = tensors["scales"]
        require_tensor("scales", scales, dtypes=_SCALES, dims=2)
        spec = integer_spec(settings.bits, settings.group_size, scale_dtype=scales.dtype)
        group_index = self._group_index(settings, spec, tensors.get("g_idx"), shape)
        if group_index is not None:
            spec = replace(spec, grouping=Grouping.groups(settings.group_size, permuted=True))
        for name, (wanted, _) in self.expected(settings, spec, shape).items():
            if name in tensors:
                require_tensor(name, tensors[name], shape=wanted)
        require_tensor("qzeros", tensors["qzeros"], dtypes=(torch.int32,))
        own = {
            "codes": as_bytes(tensors["qweight"].t()),
            "scales": scales.t().contiguous(),
            "zeros": self._read_zeros(settings, tensors["qzeros"], shape[0]),
        }
        if group_index is not None:
            own["group_index"] = group_index
        return QuantTensor(spec, own, shape).validate()

    def _read_marlin(self, settings: GptqSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        if settings.marlin and settings.bits == marlin.BITS and settings.symmetric:
            return marlin.read(settings.group_size, tensors)
        raise FormatError(
            "the weight is packed for the Marlin kernel, which the config doesn't say",
            tensor="B",
            found=_layout_of(settings),
            expected='4 bits, symmetric, and "checkpoint_format": "marlin" (or "is_marlin_format": true)',
        )

    def write(self, settings: GptqSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"GPTQ can't spell this weight: {reason}", found=tensor.spec)
        if settings.marlin:
            return marlin.write(tensor)
        in_features, own = tensor.shape[1], tensor.tensors
        groups = tensor.spec.grouping.counts(tensor.shape)[1]
        zeros = unpack(own["zeros"], settings.bits, groups).t()
        borrows = settings.borrows and settings.bits != 3
        by_field = zeros.to(torch.int16) - int(settings.version == 1 and not borrows)
        qzeros = as_words(pack(by_field, settings.bits))
        if settings.version == 1 and borrows:
            qzeros = _add_to_fields(qzeros, settings.bits, -1)
        group_size = tensor.spec.grouping.cols or in_features
        plain = torch.arange(in_features, dtype=torch.int32, device=tensor.device) // group_size
        return {
            "qweight": as_words(own["codes"]).t().contiguous(),
            "qzeros": qzeros,
            "scales": own["scales"].t().contiguous(),
            "g_idx": own.get("group_index", plain),
        }

    def refusal(self, settings: GptqSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        out_features, in_features = shape
        wanted = integer_spec(
            settings.bits, settings.group_size, permuted=spec.grouping.permuted, scale_dtype=spec.scale.dtype
        )
        if settings.bits not in BITS:
            return f"GPTQ has 2, 3, 4 and 8 bits, not {settings.bits}"
        if spec != wanted:
            return f"the checkpoint holds '{wanted}'"
        if settings.marlin:
            return marlin.refusal(settings.group_size, shape) if not spec.grouping.permuted else "Marlin has no g_idx"
        if in_features * spec.bits % 32 or out_features * spec.bits % 32:
            return f"{out_features} x {in_features} at {spec.bits} bits doesn't fill whole 32-bit words"
        return None

    def _shape(self, settings: GptqSettings, qweight: Tensor) -> tuple[int, int]:
        require_tensor("qweight", qweight, dtypes=(torch.int32,), dims=2)
        if qweight.shape[0] * 32 % settings.bits:
            raise FormatError(
                f"rows don't hold whole {settings.bits}-bit values", tensor="qweight", found=list(qweight.shape)
            )
        return qweight.shape[1], qweight.shape[0] * 32 // settings.bits

    def _group_index(
        self, settings: GptqSettings, spec: QuantSpec, g_idx: Tensor | None, shape: tuple[int, int]
    ) -> Tensor | None:
        """None where the groups are consecutive columns."""
        if g_idx is None:
            return None
        require_tensor("g_idx", g_idx, shape=(shape[1],), dtypes=(torch.int32, torch.int64))
        size = settings.group_size if settings.group_size > 0 else shape[1]
        plain = torch.arange(shape[1], dtype=g_idx.dtype, device=g_idx.device) // size
        if torch.equal(g_idx, plain):
            return None
        if settings.group_size == -1:
            raise FormatError(
                "group_size -1 has one group", tensor="g_idx", found=f"up to {int(g_idx.max())}", expected=0
            )
        low, high, groups = int(g_idx.min()), int(g_idx.max()), spec.grouping.counts(shape)[1]
        if low < 0 or high >= groups:
            raise FormatError(
                "a column's group is out of range", tensor="g_idx", found=f"{low}..{high}", expected=f"0..{groups - 1}"
            )
        return g_idx.to(torch.int32)

    def _read_zeros(self, settings: GptqSettings, qzeros: Tensor, out_features: int) -> Tensor:
        stored = unpack(as_bytes(qzeros), settings.bits, out_features)
        if settings.version == 1 and settings.borrows and settings.bits != 3:
            zeros = unpack(as_bytes(_add_to_fields(qzeros, settings.bits, 1)), settings.bits, out_features)
        else:
            zeros = stored.to(torch.int16) + int(settings.version == 1)
        middle = 1 << settings.bits - 1
        if settings.symmetric and settings.version == 1 and bool((stored == middle).all()):
            raise FormatError(
                "symmetric zero points are stored as in version 2, but version 1 is declared; "
                'set "checkpoint_format": "gptq_v2" in the quantization_config if that is what the file is',
                tensor="qzeros",
                found=middle,
                expected=middle - 1,
            )
        return pack(zeros.t(), settings.bits)


def _format_of(config: Json) -> Any:
    """AutoGPTQ 0.7 marked the layout of Marlin by a flag; the names of other kernels mean version 1."""
    if config.get("is_marlin_format") is True:
        return "marlin"
    return config.get("checkpoint_format") or config.get("format") or "gptq"


def _expression(pattern: object) -> str:
    if not isinstance(pattern, str):
        raise SpecError(f"a pattern is a text; found {pattern!r:.80}")
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


def _layout_of(settings: GptqSettings | None) -> dict[str, Any]:
    if settings is None:
        return {}
    values = (settings.bits, settings.group_size, settings.symmetric, settings.desc_act)
    return dict(zip(_LAYOUT, values, strict=True))


def _writer_borrows(meta: object) -> bool:
    """Whether ``meta.quantizer`` (a list of ``name:version``) names a writer that subtracts from whole words."""
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(isinstance(name, str) and name.partition(":")[0] in ("gptqmodel", "lowbit") for name in names)


def _add_to_fields(words: Tensor, bits: int, amount: int) -> Tensor:
    """Add `amount` to the lowest bit of every field of an int32 word, carrying from field to field."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    total = (words.to(torch.int64) + amount * ones) & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)
