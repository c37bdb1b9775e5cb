"""Writes the table of docs/conversions.md anew, between its two marks."""

from __future__ import annotations

from pathlib import Path

from lowbit.wire.conversions import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conversions.md"
MARKS = "<!-- table: tools/make_conversions.py -->\n", "<!-- end of table -->\n"


def page(text: str) -> str:
    """The page with the table as the code has it."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table()}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
