"""The small floating-point numbers of the OCP microscaling formats, as tables: what each code stands for.

Codes are in the order of their bits: sign, exponent, mantissa. Neither format has infinities or NaNs.
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
