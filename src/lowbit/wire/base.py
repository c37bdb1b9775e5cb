"""What a wire is, and the checks that several wires make."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lowbit.core import FloatCode, IntCode, QuantSpec, QuantTensor, TableCode
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError

_LARGEST_GROUP = 1 << 31

Settings = TypeVar("Settings")
Json = Mapping[str, Any]


class Wire(abc.ABC, Generic[Settings]):
    """Reads and writes one format.

    `Settings` is a frozen dataclass: what ``config.json`` says once for the whole checkpoint, parsed and checked.
    ``read(write(t))`` gives every bit of ``t`` back, and ``write(read(bytes))`` the same bytes where the format has one
    spelling only.

    Attributes:
        name: the wire's own name, unique among wires.
        quant_method: what ``quantization_config.quant_method`` calls the format.
        suffixes: the names that a weight's tensors have behind the module's name; all that may occur.
        marker: the suffix whose presence says that a module is quantized.
        fused_suffixes: where experts that are stored fused and transposed (Llama 4) stay so in this format: what
            follows the names of their parameters. The last one says that they are quantized.
        activation_scales: endings of tensors by which the outputs of an activation are divided.
        needs_shapes: whether :meth:`read` depends on :meth:`with_shapes`.
        describes_itself: whether the tensors say everything, so that :meth:`describe` can do without a config.
        kept: endings of tensors that no module has, and that are saved again as they were.

    Three methods serve conversion: :meth:`settings_for` and :meth:`spelling` say how another format's weight would be
    spelled here, :meth:`join` makes one checkpoint of many weights.
    """

    name: ClassVar[str]
    quant_method: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    marker: ClassVar[str]
    fused_suffixes: ClassVar[tuple[str, ...]] = ()
    activation_scales: ClassVar[tuple[str, ...]] = ()
    needs_shapes: ClassVar[bool] = False
    describes_itself: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()

    def detect(self, config: Json) -> bool:
        """Whether a ``quantization_config`` is of this wire."""
        return config.get("quant_method") == self.quant_method

    def modules(self, names: Collection[str]) -> list[str]:
        """The modules whose weights are packed, in the order of a checkpoint's `names`."""
        ending = f".{self.marker}"
        return [name.removesuffix(ending) for name in names if name.endswith(ending)]

    @abc.abstractmethod
    def parse(self, config: Json) -> Settings:
        """Check a ``quantization_config``.

        Raises:
            FormatError: a value is missing, of the wrong type, or out of range.
        """

    @abc.abstractmethod
    def config(self, settings: Settings) -> dict[str, Any]:
        """The ``quantization_config`` that the original library would write."""

    def describe(self, modules: Sequence[str], read: Callable[[str], Tensor | None]) -> dict[str, Any]:
        """The ``quantization_config`` of files that have none, where the format `describes_itself`.

        Args:
            modules: those whose weights are packed.
            read: gives a tensor by its full name, None where there is none.

        Raises:
            FormatError: the format's tensors don't say it.
        """
        raise FormatError(f"the tensors of '{self.name}' don't say how they are quantized", found=list(modules)[:1])

    def bind(self, settings: Settings, metadata: Mapping[str, str]) -> Settings:
        """The settings completed by what the headers of the weights' files say (their ``__metadata__``, merged)."""
        del metadata
        return settings

    def metadata(
        self, settings: Settings, weights: Mapping[str, tuple[QuantSpec, tuple[int, int]]], others: Collection[str]
    ) -> dict[str, str]:
        """What the headers have to say of a checkpoint with these packed weights (by module) and other tensors."""
        del settings, weights, others
        return {}

    def with_shapes(self, settings: Settings, shapes: Mapping[str, tuple[int, int]]) -> Settings:
        """The settings completed by the shapes of weights ``(out, in)``, for formats whose tensors don't say them."""
        del shapes
        return settings

    def side_files(
        self, settings: Settings, weights: Mapping[str, tuple[QuantSpec, tuple[int, int]]]
    ) -> dict[str, Any]:
        """The JSON files, by name, that readers of these packed weights (by module) look for beside ``config.json``."""
        del settings, weights
        return {}

    def of(self, settings: Settings, module: str) -> Settings:
        """The settings of one module, for formats that hold several; every other method takes these."""
        del module
        return settings

    def settings_for(self, spec: QuantSpec) -> Settings:
        """The settings under which a weight of `spec` is written, if need be in another spelling of the same numbers.

        Raises:
            FormatError: the format has nothing of the kind; says what it has.
        """
        raise FormatError(f"the format '{self.name}' can't be converted to", found=spec)

    def vary(self, settings: Settings, variant: str) -> Settings:
        """The settings of a variant of the format by its name, as in ``lowbit convert --to awq:gemv``.

        Raises:
            FormatError: there is no such variant; says which there are.
        """
        raise FormatError(f"'{self.name}' has no variants", found=variant)

    def spelling(self, settings: Settings, spec: QuantSpec) -> QuantSpec:
        """The spec nearest to `spec` that :meth:`write` takes under these settings (of one module)."""
        del spec
        return self.spec(settings)

    def join(self, settings: Mapping[str, Settings], kept: Collection[str]) -> Settings:
        """One checkpoint's settings from those of its modules; `kept` are the linear layers that stay dense.

        Raises:
            FormatError: modules differ in what the format says once for all.
        """
        del kept
        first, *others = settings.values()
        for module, other in zip(list(settings)[1:], others, strict=True):
            if other != first:
                raise FormatError(
                    f"'{self.name}' has one layout for all weights", tensor=module, found=other, expected=first
                )
        return first

    @abc.abstractmethod
    def spec(self, settings: Settings) -> QuantSpec:
        """What the settings say of every weight. A single weight's tensors may say more (its dtype, a permutation)."""

    @abc.abstractmethod
    def expected(self, settings: Settings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        """The tensors that :meth:`write` gives for a weight ``[out, in]``, by suffix."""

    @abc.abstractmethod
    def read(self, settings: Settings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        """One weight from its tensors, by suffix; validated.

        Raises:
            FormatError: tensors are missing, or disagree with the settings or with each other.
        """

    @abc.abstractmethod
    def write(self, settings: Settings, tensor: QuantTensor) -> dict[str, Tensor]:
        """The inverse of :meth:`read`.

        Raises:
            FormatError: the format can't spell this spec.
        """

    def read_fused(self, settings: Settings, name: str, tensors: Mapping[str, Tensor]) -> list[QuantTensor]:
        """The experts in a parameter that the format keeps fused: one weight ``[out, in]`` each.

        Args:
            name: of the parameter, ``gate_up_proj`` or ``down_proj``.
            tensors: by what follows the parameter's name, see :attr:`fused_suffixes`.

        Raises:
            FormatError: tensors are missing or disagree.
        """
        raise FormatError(f"'{self.name}' has no fused experts", tensor=name, found=sorted(tensors))

    def write_fused(self, settings: Settings, name: str, experts: Sequence[QuantTensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`read_fused`, by what follows the parameter's name."""
        raise FormatError(f"'{self.name}' has no fused experts", tensor=name, found=len(experts))

    def check_names(self, others: Collection[str]) -> None:
        """Look at the names of a checkpoint's tensors that belong to no packed weight.

        Raises:
            FormatError: one of them changes what the model computes, and lowbit doesn't do that.
        """
        del others

    @abc.abstractmethod
    def refusal(self, settings: Settings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        """Why a weight of this spec and shape can't be written, or None where it can."""


def require_tensors(tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise a FormatError for the first of `names` that `tensors` lacks."""
    for name in names:
        if name not in tensors:
            raise FormatError("a quantized weight lacks a tensor", tensor=name, found=sorted(tensors), expected=name)


def require_tensor(
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] = (),
    dims: int | None = None,
) -> None:
    """Raise a FormatError unless the tensor has the shape, one of the dtypes, and so many dimensions, none empty."""
    if dims is not None and tensor.dim() != dims:
        raise FormatError(
            "wrong number of dimensions", tensor=name, found=list(tensor.shape), expected=f"{dims} dimensions"
        )
    if dims is not None and dims > 1 and 0 in tensor.shape:
        raise FormatError("has no element", tensor=name, found=list(tensor.shape))
    if shape is not None and tuple(tensor.shape) != shape:
        raise FormatError("wrong shape", tensor=name, found=list(tensor.shape), expected=list(shape))
    if dtypes and tensor.dtype not in dtypes:
        raise FormatError("wrong dtype", tensor=name, found=tensor.dtype, expected=" or ".join(map(str, dtypes)))


def require_layout(tensors: Mapping[str, Tensor], layout: TensorLayout) -> None:
    """Raise a FormatError unless every tensor of `layout` is there with its shape and dtype."""
    require_tensors(tensors, list(layout))
    for name, (shape, dtype) in layout.items():
        require_tensor(name, tensors[name], shape=shape, dtypes=(dtype,))


def field(config: Json, name: str, kind: type, default: Any = None, *, allowed: Sequence[Any] = ()) -> Any:
    """A value of a configuration, of exactly the type `kind` (a bool is not an int here).

    Raises:
        FormatError: absent without a default, of another type, or not one of `allowed`.
    """
    value = config.get(name, default)
    if value is None and default is None:
        raise FormatError(f"quantization_config lacks '{name}'", found=sorted(map(str, config)), expected=name)
    if type(value) is not kind:
        raise FormatError(
            f"quantization_config.{name} has the wrong type", found=repr(value)[:80], expected=kind.__name__
        )
    if allowed and value not in allowed:
        raise FormatError(f"quantization_config.{name} is out of range", found=repr(value)[:80], expected=list(allowed))
    return value


def group_size_of(config: Json, *names: str, default: int = 128) -> int:
    """The group size under the first of `names` that is there: positive, or -1 for one group per row.

    Raises:
        FormatError: anything else.
    """
    name = next((name for name in names if name in config), names[0])
    size: int = field(config, name, int, default)
    if size != -1 and not 0 < size < _LARGEST_GROUP:
        raise FormatError(
            f"quantization_config.{name} is out of range", found=size, expected="-1 or a positive integer"
        )
    return size


def names_in(config: Json, name: str) -> tuple[str, ...]:
    """A list of texts in a configuration; absent or null is none.

    Raises:
        FormatError: anything else.
    """
    value = config.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise FormatError(f"quantization_config.{name} is not a list of names", found=repr(value)[:80])
    return tuple(value)


def group_size_for(spec: QuantSpec) -> int:
    """The size of groups along the input axis that is nearest to those of another format's spec, -1 for whole rows.

    Raises:
        FormatError: its groups run across the rows.
    """
    if spec.grouping.strided:
        raise FormatError("groups run along the input axis here", found=spec.grouping, expected="neighbouring columns")
    return spec.grouping.cols or -1


def bits_for(spec: QuantSpec, allowed: Sequence[int]) -> int:
    """The least of `allowed` that holds another format's codes, or the largest of them.

    Raises:
        FormatError: they are no numbers of their own, but vectors or blocks.
    """
    if not isinstance(spec.code, IntCode | TableCode | FloatCode):
        raise FormatError("codes are integers here", found=spec.code, expected=f"{list(allowed)} bits")
    return next((bits for bits in allowed if bits >= spec.bits), allowed[-1])


def scale_dtype_for(spec: QuantSpec) -> torch.dtype:
    """Of scales in formats whose other readers take 16 bits: bf16 where the scales are, else fp16."""
    return torch.bfloat16 if spec.scale.dtype == torch.bfloat16 else torch.float16


def as_words(packed: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Read the bytes of the last axis as wider integers."""
    return packed.reshape(-1).contiguous().view(dtype).view(*packed.shape[:-1], -1)


def as_bytes(words: Tensor) -> Tensor:
    """Read integers of any width as bytes along the last axis."""
    return words.reshape(-1).contiguous().view(torch.uint8).view(*words.shape[:-1], -1)
