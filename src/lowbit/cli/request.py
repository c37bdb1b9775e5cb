"""From the options of ``lowbit quantize`` to a quantization config; refuses what can't be, before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from lowbit.errors import PlanError


class Method(str, Enum):
    """How the numbers are chosen."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    fp8 = "fp8"
    hqq = "hqq"
    rtn = "rtn"


class Format(str, Enum):
    """How they are written."""

    bitsandbytes = "bitsandbytes"
    gptq = "gptq"
    awq = "awq"
    hqq = "hqq"
    compressed_tensors = "compressed-tensors"
    quanto = "quanto"
    torchao = "torchao"
    eetq = "eetq"
    fbgemm_fp8 = "fbgemm_fp8"


@dataclass(frozen=True)
class Request:
    """The options; None where the user said nothing.

    Attributes:
        compute_dtype: what 4-bit bitsandbytes layers compute in.
    """

    method: Method
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    double_quant: bool = False
    format: Format | None = None
    skip: tuple[str, ...] = ()
    compute_dtype: str | None = None

    def config(self) -> Any:
        """The quantization config for `from_pretrained`.

        Raises:
            PlanError: the options contradict each other.
        """
        name, forms = self.method.value, formats_of(self.method)
        form = self.format or forms[0]
        listed = _either([known.value for known in forms])
        _refuse(form not in forms, f"{name} is written as {listed}, not as {form.value}")
        _refuse(
            self.double_quant and self.method not in (Method.nf4, Method.fp4),
            f"--double-quant is for nf4 and fp4, not for {name}",
        )
        choice = _CHOICES[self.method, form]
        bits = choice.bits[0] if self.bits is None else self.bits
        what = form.value if self.method is Method.rtn else name
        _refuse(bits not in choice.bits, f"{what} has {_either(sorted(choice.bits))} bits, not {bits}")
        choice = choice.at(bits)
        self._check_groups(choice, what)
        self._check_symmetry(choice, what)
        size = choice.group_size if self.group_size is None else self.group_size
        return choice.build(replace(self, bits=bits, group_size=size, format=form))

    def _check_groups(self, choice: _Choice, what: str) -> None:
        size = self.group_size
        if size is None:
            return
        _refuse(size != -1 and size < 1, f"a group has at least 1 weight, or -1 stands for whole rows; not {size}")
        _refuse(choice.groups == (), f"{what} chooses what shares a scale itself, so that there is no group size")
        _refuse(bool(choice.groups) and size not in (choice.groups or ()), f"{what} has {choice.listed}, not of {size}")

    def _check_symmetry(self, choice: _Choice, what: str) -> None:
        if self.symmetric is None or self.symmetric in choice.symmetric:
            return
        if not choice.symmetric:
            raise PlanError(f"{what} is a table of values: neither --symmetric nor --asymmetric applies")
        raise PlanError(f"{what} is {'asymmetric' if self.symmetric else 'symmetric'}")

    @property
    def skipped(self) -> list[str] | None:
        return list(self.skip) or None


def formats_of(method: Method) -> list[Format]:
    """The formats that a method is written in, the default first."""
    return [form for known, form in _CHOICES if known is method]


@dataclass(frozen=True)
class _Choice:
    """What a method has in a format.

    Attributes:
        bits: the default first.
        build: makes the config of a request whose bits, group size and format are filled in.
        group_size: the default.
        groups: the sizes that there are; empty where there is nothing to choose, None where any will do.
        symmetric: what there is; empty where the question has no meaning.
        others: what differs at other widths.
    """

    bits: tuple[int, ...]
    build: Callable[[Request], Any]
    group_size: int | None = None
    groups: tuple[int, ...] | None = ()
    symmetric: tuple[bool, ...] = (True,)
    others: tuple[tuple[int, dict[str, Any]], ...] = ()

    def at(self, bits: int) -> _Choice:
        return replace(self, **dict(self.others).get(bits, {}))

    @property
    def listed(self) -> str:
        sizes = self.groups or ()
        return f"blocks of {sizes[0]}" if len(sizes) == 1 else f"groups of {_either(sizes)}"


def _bitsandbytes_table(request: Request) -> Any:
    import lowbit

    return lowbit.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=request.method.value,
        bnb_4bit_use_double_quant=request.double_quant,
        bnb_4bit_compute_dtype=request.compute_dtype,
        llm_int8_skip_modules=request.skipped,
    )


def _bitsandbytes_int8(request: Request) -> Any:
    import lowbit

    return lowbit.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=request.skipped)


def _gptq(request: Request) -> Any:
    import lowbit

    return lowbit.GPTQConfig(
        request.bits or 0,
        group_size=request.group_size,
        sym=bool(request.symmetric),
        modules_to_not_convert=request.skipped,
    )


def _awq(request: Request) -> Any:
    import lowbit

    return lowbit.AwqConfig(
        bits=request.bits,
        group_size=request.group_size,
        zero_point=not request.symmetric,
        modules_to_not_convert=request.skipped,
    )


def _hqq(request: Request) -> Any:
    import lowbit

    size = None if request.group_size == -1 else request.group_size
    return lowbit.HqqConfig(
        nbits=request.bits or 0, group_size=size, axis=1, skip_modules=["lm_head", *(request.skipped or ())]
    )


def _compressed_integers(request: Request) -> Any:
    import lowbit

    grouped = request.group_size != -1
    weights = {
        "num_bits": request.bits,
        "type": "int",
        "symmetric": bool(request.symmetric),
        "strategy": "group" if grouped else "channel",
        **({"group_size": request.group_size} if grouped else {}),
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return lowbit.CompressedTensorsConfig(config_groups=groups, ignore=_ignored(request))


def _compressed_float8(request: Request) -> Any:
    import lowbit

    return lowbit.CompressedTensorsConfig(config_groups={"FP8_DYNAMIC": ["Linear"]}, ignore=_ignored(request))


def _ignored(request: Request) -> list[str]:
    """compressed-tensors knows full names and expressions, no other patterns."""
    from lowbit.nn.planning import as_expression

    return ["lm_head", *(f"re:{as_expression(pattern)}" for pattern in request.skipped or ())]


def _quanto(request: Request) -> Any:
    import lowbit

    weights = "float8" if request.method is Method.fp8 else f"int{request.bits}"
    return lowbit.QuantoConfig(weights=weights, modules_to_not_convert=request.skipped)


def _torchao_integers(request: Request) -> Any:
    import lowbit

    grouped: dict[str, Any] = {"group_size": request.group_size} if request.bits == 4 else {}
    return lowbit.TorchAoConfig(f"int{request.bits}_weight_only", modules_to_not_convert=request.skipped, **grouped)


def _torchao_float8(request: Request) -> Any:
    import lowbit

    kind = {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}
    return lowbit.TorchAoConfig({"default": kind}, modules_to_not_convert=request.skipped)


def _eetq(request: Request) -> Any:
    import lowbit

    return lowbit.EetqConfig("int8", modules_to_not_convert=request.skipped)


def _fbgemm(request: Request) -> Any:
    import lowbit

    return lowbit.FbgemmFp8Config(modules_to_not_convert=request.skipped)


_BOTH, _NEITHER, _ASYMMETRIC = (True, False), (), (False,)
_TABLE = _Choice((4,), _bitsandbytes_table, 64, (64,), _NEITHER)
_CHOICES: dict[tuple[Method, Format], _Choice] = {
    (Method.nf4, Format.bitsandbytes): _TABLE,
    (Method.fp4, Format.bitsandbytes): _TABLE,
    (Method.int8, Format.bitsandbytes): _Choice((8,), _bitsandbytes_int8),
    (Method.fp8, Format.fbgemm_fp8): _Choice((8,), _fbgemm),
    (Method.fp8, Format.compressed_tensors): _Choice((8,), _compressed_float8),
    (Method.fp8, Format.torchao): _Choice((8,), _torchao_float8),
    (Method.fp8, Format.quanto): _Choice((8,), _quanto),
    (Method.hqq, Format.hqq): _Choice((4, 8, 3, 2, 1), _hqq, 64, None, _ASYMMETRIC),
    (Method.rtn, Format.gptq): _Choice((4, 2, 3, 8), _gptq, 128, None, _BOTH),
    (Method.rtn, Format.awq): _Choice((4,), _awq, 128, None, _BOTH),
    (Method.rtn, Format.compressed_tensors): _Choice((4, 2, 3, 5, 6, 7, 8), _compressed_integers, 128, None, _BOTH),
    (Method.rtn, Format.quanto): _Choice(
        (4, 2, 8), _quanto, symmetric=_ASYMMETRIC, others=((8, {"symmetric": (True,)}),)
    ),
    (Method.rtn, Format.torchao): _Choice(
        (8, 4),
        _torchao_integers,
        others=((4, {"group_size": 128, "groups": (32, 64, 128, 256), "symmetric": _ASYMMETRIC}),),
    ),
    (Method.rtn, Format.eetq): _Choice((8,), _eetq),
}


def _either(names: Any) -> str:
    return " or ".join(map(str, names))


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise PlanError(message)
