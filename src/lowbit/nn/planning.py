"""The plan for a model: a pure function of its modules (also on the meta device) and what is asked for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from lowbit.core import Kept, Plan, QuantSpec, patterns
from lowbit.errors import PlanError, SpecError
from lowbit.nn.experts import find_projections
from lowbit.nn.swap import is_linear, linear_shape

Choice = Callable[[str, tuple[int, int]], QuantSpec | Kept]
Refusal = Callable[[str, QuantSpec, tuple[int, int]], str | None]
_PLAIN = re.compile(r"[\w.\-]+")
_GLOB = re.compile(r"[\w.\-*?]+")
_PATTERN_LIMIT = 1000


def plan_model(
    model: nn.Module,
    spec: QuantSpec | Choice,
    *,
    skip: Iterable[str] = (),
    keep: dict[str, str] | None = None,
    refusal: Refusal | None = None,
) -> Plan:
    """Decide what happens to every weight of two or more dimensions.

    Fused experts have an entry per parameter, shaped ``(experts, out, in)``; what is decided is decided for one
    expert's matrix, where gate and up are two.

    Args:
        spec: for the weights that are quantized; or a function of a module's name and its weight's shape that gives it,
            or the reason why this weight stays dense.
        skip: patterns of modules that stay dense, see :func:`matches`; they add to `keep`.
        keep: modules that stay dense by default, each with the reason (:func:`default_keep`).
        refusal: says why the weight of a module, of a spec and shape, can't be stored, or None.

    Raises:
        PlanError: a pattern is not usable, or nothing at all would be quantized.
    """
    unwanted, keep = list(skip), keep or {}
    entries: dict[str, QuantSpec | Kept] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        experts = find_projections(module)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            key = name if parameter_name == "weight" else f"{name}.{parameter_name}".removeprefix(".")
            shapes[key] = tuple(parameter.shape)
            if parameter_name == "weight" and is_linear(module):
                shapes[key] = linear_shape(module)
                entries[key] = _fate(key, linear_shape(module), spec, unwanted, keep, refusal)
            elif projection := experts.get(parameter_name):
                shapes[key] = (projection.experts, *projection.shape)
                pattern = matches(name, unwanted)  # of the experts as a whole
                fate = _fate(key, projection.part_shape, spec, unwanted, keep, refusal)
                entries[key] = Kept(f"skipped by '{pattern}'") if pattern and key not in keep else fate
            else:
                entries[key] = Kept(keep.get(key) or _not_linear(module, parameter_name, parameter.dim()))
    plan = Plan(entries, shapes)
    if not plan.quantized:
        raise PlanError(f"nothing in this model would be quantized:\n{plan}")
    return plan


def default_keep(model: nn.Module) -> dict[str, str]:
    """The modules of a Transformers model that stay dense unless told otherwise, each with the reason.

    Output heads, what the model's authors keep in fp32, and everything that is tied to another module: quantizing one
    end of a tie would leave two different weights.
    """
    keep: dict[str, str] = {}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        keep[source.removesuffix(".weight")] = f"tied to {target.removesuffix('.weight')}"
        keep[target.removesuffix(".weight")] = f"tied to {source.removesuffix('.weight')}"
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    in_fp32 = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    for name, module in model.named_modules():
        if head is not None and module is head:
            keep.setdefault(name, "output head")
        if is_linear(module) and in_fp32 & set(name.split(".")):
            keep.setdefault(name, "the model keeps it in fp32")
        for parameter in find_projections(module) if in_fp32 else ():
            if in_fp32 & {*name.split("."), parameter}:
                keep[f"{name}.{parameter}"] = "the model keeps it in fp32"
    if hasattr(model, "get_output_embeddings"):
        parameters = list(model.named_parameters())
        last = parameters[-1][0].rpartition(".")[0] if parameters else ""
        if "." not in last:
            # Task heads (classifiers, regressors) end a model and are not among its output embeddings.
            keep.setdefault(last, "last module, a head")
    return keep


def matches(name: str, wanted: Sequence[str]) -> str | None:
    """The first pattern that a module name matches, or None.

    A plain name matches itself, everything below it, and as a suffix at a dot (``lm_head``, ``model.layers.0``,
    ``self_attn.q_proj``). ``*`` and ``?`` are wildcards over the whole name. What matches as neither is taken as a
    regular expression, from the start of the name to a dot or the end.

    Raises:
        PlanError: an expression is invalid, or beyond what :mod:`lowbit.core.patterns` matches.
    """
    for pattern in wanted:
        if _matches(name, pattern):
            return pattern
    return None


def as_expression(pattern: str) -> str:
    """A regular expression that ``re.match`` finds in the names that :func:`matches` finds `pattern` in.

    For formats that store what is left out as expressions. Names are taken to hold no line breaks.
    """
    if _PLAIN.fullmatch(pattern):
        plain = re.escape(pattern.removesuffix(".weight"))
        return rf"(?:(?:.*\.)?{plain}$|{plain}\.)"
    if not _GLOB.fullmatch(pattern):
        return rf"(?:{pattern})(?:\.|$)"
    glob = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return f"{glob}$" if pattern[0] in "*?" else rf"(?:{glob}$|(?:{pattern})(?:\.|$))"


def _matches(name: str, pattern: str) -> bool:
    if not isinstance(pattern, str) or not pattern or len(pattern) > _PATTERN_LIMIT:
        raise PlanError(f"a module pattern is a text of 1 to {_PATTERN_LIMIT} characters, not {pattern!r:.80}")
    plain = pattern.removesuffix(".weight")
    if _PLAIN.fullmatch(pattern):
        return f".{name}.".endswith(f".{plain}.") or f"{name}.".startswith(f"{plain}.")
    if _GLOB.fullmatch(pattern) and (fnmatch.fnmatchcase(name, pattern) or pattern[0] in "*?"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return patterns.match(rf"(?:{pattern})(?=\.|$)", name)
    except SpecError as error:
        raise PlanError(f"the module pattern can't be used: {error}") from error


def _fate(
    name: str,
    shape: tuple[int, int],
    choice: QuantSpec | Choice,
    unwanted: Sequence[str],
    keep: dict[str, str],
    refusal: Refusal | None,
) -> QuantSpec | Kept:
    if name in keep:
        return Kept(keep[name])
    if pattern := matches(name, unwanted):
        return Kept(f"skipped by '{pattern}'")
    spec = choice if isinstance(choice, QuantSpec) else choice(name, shape)
    if isinstance(spec, QuantSpec) and (reason := refusal and refusal(name, spec, shape)):
        return Kept(reason)
    return spec


def _not_linear(module: nn.Module, parameter: str, dims: int) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    kind = type(module).__name__
    if dims == 3 and "expert" in kind.lower():
        return f"fused experts of {kind}, which compute in a way that lowbit doesn't know"
    return f"{kind} is not a linear layer" if parameter == "weight" else f"a parameter of {kind}, not of a linear layer"
