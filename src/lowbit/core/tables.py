"""Tables of values that several formats share; a weight's own table is stored with it and decides."""

from __future__ import annotations

from typing import Final

# E2M1 by its bit patterns: sign, 2 bits of exponent, 1 of mantissa (OCP Microscaling Formats 1.0, 5.3.3). MXFP4 and
# NVFP4 have these numbers; a spec calls them TableCode("e2m1").
E2M1: Final[tuple[float, ...]] = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
# IQ4_NL and IQ4_XS of ggml: 16 steps, denser around 0.
IQ4_NL: Final[tuple[float, ...]] = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
# Q1_0 of ggml: a sign.
SIGN: Final[tuple[float, ...]] = (-1.0, 1.0)
