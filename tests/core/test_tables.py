"""Tables of small floating-point numbers against what their bits mean."""

from __future__ import annotations

import math

import pytest

from lowbit.core.tables import E2M1, E2M3


@pytest.mark.parametrize(("table", "mantissa"), [(E2M1, 1), (E2M3, 3)])
def test_every_code_stands_for_its_bits(table: tuple[float, ...], mantissa: int) -> None:
    bits = 3 + mantissa
    assert len(table) == 1 << bits
    for code, value in enumerate(table):
        fraction = (code & (1 << mantissa) - 1) / (1 << mantissa)
        exponent = code >> mantissa & 3
        magnitude = fraction if exponent == 0 else (1 + fraction) * 2 ** (exponent - 1)
        assert value == (-magnitude if code >> bits - 1 else magnitude)
        assert (math.copysign(1, value) < 0) == bool(code >> bits - 1)
