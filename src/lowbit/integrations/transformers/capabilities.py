"""What each quantization method can do, found out by doing it, and which test stands behind what isn't tried here."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import transformers

from lowbit.core import FloatCode, QuantSpec, QuantTensor, VectorCode
from lowbit.core.respell import respell, simplest
from lowbit.errors import LowbitError
from lowbit.integrations.transformers.methods import METHODS, make_recipe
from lowbit.wire import Wire, wire_named, wires
from lowbit.wire.gguf.codec import SPECS

_SHAPE: Final = (256, 512)  # of the weight that is tried; every format's groups and tiles divide it
_MODULE: Final = "model.layers.0.mlp.up_proj"
UNTESTED: Final = "not tested on hardware"

# The test behind a column's yes, for every method; they go through all formats.
EVIDENCE: Final = {
    "cpu": "tests/integrations/test_every_format.py::test_it_generates_with_a_static_cache_and_stays_packed",
    "cuda": "tests/integrations/test_gpu.py::test_every_format_is_on_the_gpu_what_it_is_on_the_cpu",
    "compile": "tests/integrations/test_every_format.py::test_it_compiles_without_a_graph_break",
    "peft": "tests/integrations/test_every_format.py::test_adapters_train_on_it",
    "serializable": "tests/integrations/test_every_format.py::test_saved_and_loaded_again_it_is_the_same",
}
_TORCHAO: Final = {4: "int4_weight_only", 8: "int8_weight_only"}
_GGUF: Final = ("Q3_K", "Q4_0", "Q5_0", "Q8_0", "TQ2_0")  # made in a moment


@dataclass(frozen=True)
class Capability:
    """One method.

    Attributes:
        on_the_fly: whether dense weights are quantized while they are loaded.
        bits: per weight, scales not counted.
        cpu, cuda, rocm, metal, compile, peft, serializable: ``yes``, ``no``, or why nobody knows.
        convertible: other methods that can hold the same numbers, each with the bits at which that was tried.
    """

    method: str
    on_the_fly: bool
    cpu: str
    cuda: str
    rocm: str
    metal: str
    compile: str
    bits: tuple[int, ...]
    peft: str
    serializable: str
    convertible: dict[str, tuple[int, ...]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def capabilities() -> tuple[Capability, ...]:
    """All methods, in alphabetical order."""
    return tuple(_capability(name) for name in sorted(METHODS, key=str.lower))


def _capability(method: str) -> Capability:
    tried = list(_weights(method))
    held = [tensor for tensor, wire, settings, _ in tried if _is_held(tensor, wire, settings)]
    return Capability(
        method=method,
        on_the_fly=any(by_itself for *_, by_itself in tried),
        cpu="yes",
        cuda="yes",
        rocm=UNTESTED,
        metal=UNTESTED,
        compile="yes",
        bits=_sorted_bits(tensor for tensor, *_ in tried),
        peft="yes",
        serializable="yes" if len(held) == len(tried) else "no",
        convertible=_targets([tensor for tensor, *_, by_itself in tried if by_itself], method),
    )


def _configs(method: str) -> Iterator[dict[str, Any]]:
    """Arguments of a method's config for every width; those that it refuses say which widths there aren't."""
    widths = range(1, 9)
    if method == "bitsandbytes":
        yield from ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True})
    elif method == "quanto":
        yield from ({"weights": f"int{bits}"} for bits in widths)
    elif method == "hqq":
        yield from ({"nbits": bits, "group_size": 64} for bits in widths)
    elif method in ("gptq", "awq"):
        yield from ({"bits": bits, "group_size": 64} for bits in widths)
    elif method == "torchao":
        yield from ({"quant_type": kind} for kind in _TORCHAO.values())
        inner = {"_type": "IntxWeightOnlyConfig", "_version": 2}
        for bits in widths:
            data = {"weight_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}}
            yield {"quant_type": {"default": {**inner, "_data": data}}}
    elif method == "compressed-tensors":
        yield from ({"config_groups": {f"W{bits}A16": ["Linear"]}} for bits in widths)
    elif method == "gguf":
        yield from ({"type": kind} for kind in _GGUF)
    elif method == "aqlm":
        quick = {"beam": 1, "epochs": 0}  # what can be held doesn't depend on how well it was made
        yield from ({"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": size} | quick for size in (8, 16))
        yield from ({"num_codebooks": count, "nbits_per_codebook": 8} | quick for count in (1, 2, 4))
    else:
        yield {}


def _weights(method: str) -> Iterator[tuple[QuantTensor, Wire[Any], Any, bool]]:
    """A random weight in each width of a method, its wire and settings, and whether it was quantized on the fly."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(_SHAPE, generator=generator) * 0.05
    for arguments in _configs(method):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recipe = make_recipe(METHODS[method].config_class(**arguments))
            choose = recipe.choose_for(_model(), False) if recipe.choose_for else recipe.spec_for
            spec = choose(_MODULE, _SHAPE, torch.bfloat16)
            if not isinstance(spec, QuantSpec):
                continue
            shaped = recipe.wire.with_shapes(recipe.settings, {_MODULE: _SHAPE})
            settings = recipe.wire.of(shaped, _MODULE)
        except (LowbitError, ValueError):
            continue
        if method == "gguf":
            settings = recipe.wire.settings_for(spec)
        try:
            yield recipe.algorithm_of(_MODULE).quantize(dense.to(spec.dtype), spec), recipe.wire, settings, True
        except LowbitError:
            yield _plain(recipe.wire, settings, spec), recipe.wire, settings, False
    if method == "gguf":
        wire = wire_named("gguf")
        for spec in [spec for spec in SPECS.values() if not isinstance(spec.code, FloatCode)]:
            settings = wire.settings_for(spec)
            yield _plain(wire, settings, spec), wire, settings, False


@functools.cache
def _model() -> Any:
    """A model with a weight of the shape, for methods that look at one before they choose."""
    config = transformers.LlamaConfig(
        hidden_size=_SHAPE[1], intermediate_size=_SHAPE[0], num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def _plain(wire: Wire[Any], settings: Any, spec: QuantSpec) -> QuantTensor:
    """A weight of a kind that only somebody else's calibration makes, as it could stand in a file."""
    layout = wire.expected(settings, spec, _SHAPE)
    return wire.read(settings, {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in layout.items()})


def _is_held(tensor: QuantTensor, wire: Wire[Any], settings: Any) -> bool:
    """Whether the format gives every bit of a weight back."""
    try:
        return wire.read(settings, wire.write(settings, tensor)).equal(tensor)
    except LowbitError:
        return False


def _targets(tensors: list[QuantTensor], method: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, set[int]] = {}
    for wire in wires():
        if wire.quant_method == method:
            continue
        bits = {_bits(tensor.spec) for tensor in tensors if _converts(tensor, wire)}
        if bits:
            found.setdefault(wire.quant_method, set()).update(bits)
    return {name: tuple(sorted(bits)) for name, bits in sorted(found.items())}


def _converts(tensor: QuantTensor, wire: Wire[Any]) -> bool:
    """Whether another format holds the same numbers, to the bit."""
    return any(_spells(tensor, spec, wire) for spec in (simplest(tensor), tensor.spec))


def _spells(tensor: QuantTensor, spec: QuantSpec, wire: Wire[Any]) -> bool:
    try:
        settings = wire.settings_for(spec)
        target = wire.spelling(settings, spec)
        wire.write(settings, respell(tensor, target))
    except LowbitError:
        return False
    return True


def _sorted_bits(tensors: Iterable[QuantTensor]) -> tuple[int, ...]:
    return tuple(sorted({_bits(tensor.spec) for tensor in tensors}))


def _bits(spec: QuantSpec) -> int:
    """Bits per weight without scales, rounded up."""
    if isinstance(spec.code, VectorCode):
        code = spec.code
        return -(-code.codebooks * code.bits // (code.out_group * code.in_group))
    return spec.code.bits


def table() -> list[list[str]]:
    """The rows of the page, the titles first."""
    titles = ["method", "on the fly", "CPU", "CUDA", "ROCm", "Metal", "torch.compile", "bits", "PEFT", "serializable"]
    rows = [[*titles, "converts without loss to (at bits)"]]
    for entry in capabilities():
        cells = [entry.cpu, entry.cuda, entry.rocm, entry.metal, entry.compile, spans(entry.bits), entry.peft]
        targets = ", ".join(f"{name} ({spans(bits)})" for name, bits in entry.convertible.items())
        flying = "yes" if entry.on_the_fly else "no"
        rows.append([entry.method, flying, *cells, entry.serializable, targets or "none"])
    return rows


def spans(numbers: tuple[int, ...]) -> str:
    """``2-4, 8`` of ``(2, 3, 4, 8)``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def markdown() -> str:
    """The table as it stands in ``docs/methods.md``."""
    head, *rows = table()
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
