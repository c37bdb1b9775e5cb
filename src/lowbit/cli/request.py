"""From the options of ``lowbit quantize`` to a quantization config; refuses what can't be, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from lowbit.errors import PlanError


class Method(str, Enum):
    """How the numbers are chosen."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    rtn = "rtn"


class Format(str, Enum):
    """How they are written."""

    bitsandbytes = "bitsandbytes"
    gptq = "gptq"
    awq = "awq"


_BITS = {Method.nf4: (4,), Method.fp4: (4,), Method.int8: (8,)}
_BITS_OF_FORMAT = {Format.gptq: (2, 3, 4, 8), Format.awq: (4,)}
_BLOCK_SIZE = 64  # of nf4 and fp4; Transformers' config can't say another


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
        return self._integer_config() if self.method is Method.rtn else self._bitsandbytes_config()

    def _bitsandbytes_config(self) -> Any:
        import lowbit

        name, allowed = self.method.value, _BITS[self.method]
        _refuse(
            self.format not in (None, Format.bitsandbytes),
            f"{name} is stored in bitsandbytes' format, not in {self._format}",
        )
        _refuse(self.bits not in (None, *allowed), f"{name} has {allowed[0]} bits, not {self.bits}")
        skip = list(self.skip) or None
        if self.method is Method.int8:
            _refuse(self.group_size is not None, "int8 has one scale per output row, so that there is no group size")
            _refuse(self.symmetric is False, "int8 is symmetric")
            _refuse(self.double_quant, "--double-quant is for nf4 and fp4, not for int8")
            return lowbit.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        _refuse(
            self.group_size not in (None, _BLOCK_SIZE), f"{name} has blocks of {_BLOCK_SIZE}, not of {self.group_size}"
        )
        _refuse(
            self.symmetric is not None, f"{name} is a table of values: neither --symmetric nor --asymmetric applies"
        )
        return lowbit.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
            llm_int8_skip_modules=skip,
        )

    def _integer_config(self) -> Any:
        import lowbit

        form = self.format or Format.gptq
        _refuse(form is Format.bitsandbytes, "bitsandbytes' format holds nf4, fp4 and int8; write rtn as gptq or awq")
        _refuse(self.double_quant, "--double-quant is for nf4 and fp4, not for rtn")
        bits, allowed = 4 if self.bits is None else self.bits, _BITS_OF_FORMAT[form]
        _refuse(bits not in allowed, f"{form.value} has {' or '.join(map(str, allowed))} bits, not {bits}")
        size = 128 if self.group_size is None else self.group_size
        _refuse(size != -1 and size < 1, f"a group has at least 1 weight, or -1 stands for whole rows; not {size}")
        symmetric, skip = bool(self.symmetric), list(self.skip) or None
        if form is Format.awq:
            return lowbit.AwqConfig(bits=bits, group_size=size, zero_point=not symmetric, modules_to_not_convert=skip)
        return lowbit.GPTQConfig(bits, group_size=size, sym=symmetric, modules_to_not_convert=skip)

    @property
    def _format(self) -> str:
        return self.format.value if self.format else ""


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise PlanError(message)
