"""Takes the examples out of a Markdown page and runs them, in order and in one namespace."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lowbit

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SET_UP = ("make ", "pip ", "git ")
# `lowbit` and `python` are those that run the test, whatever the PATH says.
_PRELUDE = 'set -euo pipefail\npython() { "$PYTHON" "$@"; }\nlowbit() { "$PYTHON" -m lowbit "$@"; }\n'


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: number of its first line of text.
        output: what it has to print: the text block that follows it directly, if one does.
    """

    language: str
    text: str
    line: int
    output: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, except those that show another's output."""
    source = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(source))
    shows: dict[int, str] = {}  # the number of a block -> the output that follows it
    for number, (block, following) in enumerate(itertools.pairwise(found)):
        if following[1] == "text" and not source[block.end() : following.start()].strip():
            shows[number] = following[2]
    return [
        Block(match[1], match[2], source.count("\n", 0, match.start(2)) + 1, shows.get(number))
        for number, match in enumerate(found)
        if number - 1 not in shows
    ]


def run_python(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    """Run a block with line numbers of the page, and compare what it prints."""
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    if block.output is not None:
        assert printed.getvalue() == block.output, f"{page.name}, line {block.line}"


def run_shell(page: Path, block: Block, folder: Path) -> None:
    """Run the commands of a block, except those that set things up."""
    script = "".join(line for line in block.text.splitlines(keepends=True) if not line.startswith(_SET_UP))
    source = Path(lowbit.__file__).parent.parent
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = ["bash", "-c", _PRELUDE + script]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        pytest.fail(f"{page.name}, line {block.line}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    if block.output is not None:
        assert done.stdout == block.output, f"{page.name}, line {block.line}"
