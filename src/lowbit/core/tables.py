"""Tables that several formats share: what each code stands for.

The small floating-point numbers of the OCP microscaling formats first: their codes are in the order of their bits,
sign, exponent, mantissa. Neither format has infinities or NaNs.
"""

from __future__ import annotations

from typing import Final

_E2M1_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M3_MAGNITUDES: Final = (
    *(m / 8 for m in range(8)),
    *((1 + m / 8) * 2.0**e for e in range(3) for m in range(8)),
)

# 16 values, of MXFP4 and NVFP4.
E2M1: Final = (*_E2M1_MAGNITUDES, *(-value for value in _E2M1_MAGNITUDES))
# 64 values, of MXFP6.
E2M3: Final = (*_E2M3_MAGNITUDES, *(-value for value in _E2M3_MAGNITUDES))

# IQ4_NL and IQ4_XS of GGUF: 16 steps, denser around 0.
IQ4_NL: Final = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
# Q1_0 of GGUF: a sign.
SIGN: Final = (-1.0, 1.0)
