"""Regular expressions over module names, matched in bounded time.

Configurations hold expressions (``dynamic``, ``ignore``, ``targets``), and Python's own matcher takes exponential time
for some of them. Here all positions that a part of an expression can end at are followed at once, so that nothing is
tried twice.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Set
from typing import Any, Final

from lowbit.errors import SpecError

if sys.version_info >= (3, 11):
    from re import _parser as _grammar  # type: ignore[attr-defined]
else:
    import sre_parse as _grammar

_LENGTH: Final = 1000  # characters of an expression
_NESTING: Final = 3  # repeats inside of repeats
_COUNT: Final = 1000  # of a repeat; names are shorter

_Positions = Set[int]


def match(pattern: str, text: str) -> bool:
    """Whether `pattern` matches at the start of `text`, as ``re.match`` would find.

    Raises:
        SpecError: not a regular expression, too long, or with back-references or flags.
    """
    return bool(_sequence(_parsed(pattern), text, {0}))


def fullmatch(pattern: str, text: str) -> bool:
    """Whether `pattern` matches all of `text`.

    Raises:
        SpecError: as :func:`match`.
    """
    return len(text) in _sequence(_parsed(pattern), text, {0})


@functools.lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Any:
    if len(pattern) > _LENGTH:
        raise SpecError(f"a pattern has up to {_LENGTH} characters; found {len(pattern)}")
    try:
        tree = _grammar.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise SpecError(f"{pattern!r:.80} is not a regular expression: {error}") from error
    if tree.state.flags & ~re.UNICODE:
        raise SpecError(f"a pattern of module names has no flags; found {pattern!r:.80}")
    _check(tree, 0)
    return tree


def _check(tree: Any, repeats: int) -> None:
    """Refuse what can't be matched, before any name is looked at."""
    if repeats > _NESTING:
        raise SpecError(f"repeats are nested deeper than {_NESTING}")
    for operation, argument in tree:
        if operation.name not in _STEPS:
            raise SpecError(f"patterns of module names have no {operation.name.lower().replace('_', ' ')}")
        for part, inside in _parts(operation.name, argument):
            _check(part, repeats + inside)


def _parts(name: str, argument: Any) -> list[tuple[Any, int]]:
    """The expressions inside of one, each with whether it is repeated."""
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, body = argument
        if low > _COUNT or (high != _grammar.MAXREPEAT and high > _COUNT):
            raise SpecError(f"a repeat counts up to {_COUNT}; found {max(low, high)}")
        return [(body, 1)]
    if name == "BRANCH":
        return [(part, 0) for part in argument[1]]
    if name == "SUBPATTERN":
        if argument[1] or argument[2]:
            raise SpecError("a pattern of module names has no flags")
        return [(argument[3], 0)]
    if name in ("ASSERT", "ASSERT_NOT"):
        if argument[0] < 0:
            raise SpecError("patterns of module names don't look behind")
        return [(argument[1], 0)]
    return []


def _sequence(tree: Any, text: str, positions: _Positions) -> _Positions:
    """Where a match of the whole sequence can end that starts at one of `positions`."""
    for operation, argument in tree:
        if not positions:
            break
        positions = _STEPS[operation.name](argument, text, positions)
    return positions


def _character(test: Callable[[Any, str], bool]) -> Callable[[Any, str, _Positions], _Positions]:
    def step(argument: Any, text: str, positions: _Positions) -> _Positions:
        return {at + 1 for at in positions if at < len(text) and test(argument, text[at])}

    return step


def _in_class(items: Any, character: str) -> bool:
    negated = bool(items) and items[0][0].name == "NEGATE"
    return negated != any(_in_item(operation.name, argument, character) for operation, argument in items)


def _in_item(name: str, argument: Any, character: str) -> bool:
    if name == "LITERAL":
        return bool(ord(character) == argument)
    if name == "RANGE":
        return bool(argument[0] <= ord(character) <= argument[1])
    return name == "CATEGORY" and _in_category(argument.name, character)


def _in_category(name: str, character: str) -> bool:
    kind = name.removeprefix("CATEGORY_").removeprefix("NOT_")
    belongs = {
        "DIGIT": character.isdecimal(),
        "SPACE": character.isspace(),
        "WORD": character.isalnum() or character == "_",
    }[kind]
    return belongs != ("NOT_" in name)


def _repeat(argument: Any, text: str, positions: _Positions) -> _Positions:
    low, high, body = argument
    for _ in range(low):
        positions = _sequence(body, text, positions)
    reached, frontier, count = set(positions), positions, low
    while frontier and (high == _grammar.MAXREPEAT or count < high):
        frontier = _sequence(body, text, frontier) - reached
        reached |= frontier
        count += 1
    return reached


def _branch(argument: Any, text: str, positions: _Positions) -> _Positions:
    return set().union(*(_sequence(part, text, positions) for part in argument[1]))


def _at(argument: Any, text: str, positions: _Positions) -> _Positions:
    return {at for at in positions if _holds(argument.name, text, at)}


def _holds(name: str, text: str, at: int) -> bool:
    if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return at == 0
    if name in ("AT_END", "AT_END_STRING"):
        return at == len(text)
    before = at > 0 and _in_category("CATEGORY_WORD", text[at - 1])
    after = at < len(text) and _in_category("CATEGORY_WORD", text[at])
    return (before != after) == (name == "AT_BOUNDARY")


def _ahead(wanted: bool) -> Callable[[Any, str, _Positions], _Positions]:
    def step(argument: Any, text: str, positions: _Positions) -> _Positions:
        return {at for at in positions if bool(_sequence(argument[1], text, {at})) == wanted}

    return step


_STEPS: Final[dict[str, Callable[[Any, str, _Positions], _Positions]]] = {
    "LITERAL": _character(lambda argument, character: bool(ord(character) == argument)),
    "NOT_LITERAL": _character(lambda argument, character: bool(ord(character) != argument)),
    "ANY": _character(lambda argument, character: character != "\n"),
    "IN": _character(_in_class),
    "MAX_REPEAT": _repeat,
    "MIN_REPEAT": _repeat,
    "BRANCH": _branch,
    "SUBPATTERN": lambda argument, text, positions: _sequence(argument[3], text, positions),
    "AT": _at,
    "ASSERT": _ahead(True),
    "ASSERT_NOT": _ahead(False),
}
