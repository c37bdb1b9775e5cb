"""Markup that escapes whatever it wasn't told is markup, and numbers as people read them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Final

_VOID: Final = frozenset({"meta", "br", "hr", "input", "col"})
# Control characters, those that turn the direction of what follows, and halves of surrogate pairs, which UTF-8 lacks.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_LONGEST: Final = 160  # characters of a name


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element.

    Args:
        children: :class:`Markup` as it is, other strings escaped, iterables of these, None for nothing.
        attributes: ``class_`` gives ``class``, ``data_kind`` gives ``data-kind``; None and False leave one out, True
            gives one without a value.
    """
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Children in a row, escaped where they aren't markup."""
    return Markup("".join(map(_render, children)))


def _render(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return str.__str__(child)
    if isinstance(child, str):
        return escape(child)
    return "".join(map(_render, child))


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def escape(text: str) -> str:
    """Text for an element or a quoted attribute; characters that can't be seen become a replacement character."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)


def shortened(text: str, longest: int = _LONGEST) -> str:
    """A name that is too long, without its middle."""
    half = (longest - 3) // 2
    text = _UNPRINTABLE.sub("\ufffd", text)
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, without powers of ten between a thousandth and a million."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}".replace("-", "−")


def brief(text: str) -> str:
    """A number without the zeros that end its decimals."""
    return re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text).replace(". ", " ").removesuffix(".")


def percent(share: float) -> str:
    """A share as percent."""
    return f"{number(100 * share)} %"


def bits(value: float) -> str:
    """Bits per weight."""
    return f"{value:.3f}"


def size(count: float) -> str:
    """Bytes, in powers of ten, as disks and downloads are counted."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{number(count / 10**power)} {unit}"
    return f"{int(count)} bytes"


def duration(seconds: float) -> str:
    """Seconds, minutes, or hours."""
    if seconds < 120:
        return f"{number(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def decibel(error: float) -> str:
    """A relative squared error as a ratio of signal to noise."""
    return f"{-10 * math.log10(error):.1f} dB" if error > 0 else "no noise"
