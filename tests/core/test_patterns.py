"""Patterns of module names: what `re` finds, and in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.core import patterns
from lowbit.errors import SpecError

NAMES = ["model.layers.12.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head", "", "a", "aab"]
PATTERNS = [
    r".*\.layers\.(?:1|12)\..*",
    r"model\.layers\.\d+\.mlp\.",
    r"^model\.layers\.(?!12\.).*_proj$",
    r"(?=.*mlp).*down",
    r"[^.]+\.layers\.1[0-9]?\.",
    r"\w+\b",
    r"\w\Bx*",
    r"lm_head$",
    r"(a|aa)+b",
    r"a{1,2}b",
    r"a{2}?",
    r"(?P<name>a)\Z",
    r"",
    r"\S\D+",
    r"(?:a|)*b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_what_re_matches(pattern: str, name: str) -> None:
    assert patterns.match(pattern, name) == (re.match(pattern, name) is not None)
    assert patterns.fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


_PIECES = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "a*", "b+", "a?", "(a|b)", "(?:ab)*", "(?!b)", "a{1,2}", "|"])


@given(st.lists(_PIECES, max_size=6).map("".join), st.text("ab", max_size=8))
def test_random_patterns_match_what_re_matches(pattern: str, text: str) -> None:
    assert patterns.match(pattern, text) == (re.match(pattern, text) is not None)
    assert patterns.fullmatch(pattern, text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "a?" * 200 + "a" * 200, ".*" * 100 + "b", "(?:(?:a*)*)*b", "(a|aa)*$" * 20]
)
def test_catastrophic_patterns_take_no_time(pattern: str) -> None:
    start = time.perf_counter()
    patterns.match(pattern, "a" * 100 + "c")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "*a", "a" * 1001, r"(a)\1", "(?i)a", "(?i:a)", "(?<=a)b", "a{2000}", "((((a*)*)*)*)*", "(" * 900],
)  # fmt: skip
def test_what_is_refused(pattern: str) -> None:
    with pytest.raises(SpecError):
        patterns.match(pattern, "a")
