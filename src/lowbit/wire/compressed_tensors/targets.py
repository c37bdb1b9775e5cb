"""Which scheme a module has: names before expressions before classes, each in alphabetical order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from lowbit.core import patterns
from lowbit.errors import FormatError, SpecError

# Wires know modules by name alone. What they hold are linear layers, but for embeddings, which have telling names.
_LINEAR: Final = ("Linear", "LinearBase", "Module")
_EMBEDDINGS: Final = ("wte", "wpe")


def matches_name(target: str, module: str) -> bool:
    """Whether a target names the module: literally, or by an expression after ``re:`` that matches from the start.

    Raises:
        FormatError: the expression is none, or is of a kind that can take forever.
    """
    if not target.startswith("re:"):
        return target == module
    try:
        return patterns.match(target[3:], module)
    except SpecError as error:
        raise FormatError(f"a target can't be used: {error}", found=repr(target)[:80]) from error


def matches_class(target: str, module: str) -> bool:
    """Whether a target names a class of linear layers, or of embeddings where the module is called like one."""
    if target == "Embedding":
        last = module.rpartition(".")[2]
        return "embed" in last or last in _EMBEDDINGS
    return target in _LINEAR or (target.isidentifier() and target.endswith("Linear"))


def first_match(targets: Iterable[str], module: str) -> str | None:
    """The target that decides for a layer, or None where none matches."""
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    for target in ordered:
        if matches_name(target, module):
            return target
    return next((target for target in ordered if matches_class(target, module)), None)


def is_ignored(ignore: Sequence[str], module: str) -> bool:
    """Whether a layer is on an ``ignore`` list."""
    return first_match(ignore, module) is not None
