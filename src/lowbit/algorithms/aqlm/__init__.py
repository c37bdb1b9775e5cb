"""Additive quantization of weights with learned codebooks (AQLM, arXiv:2401.06118)."""

from lowbit.algorithms.aqlm.additive import AdditiveQuantization
from lowbit.algorithms.aqlm.tiles import decode

__all__ = ["AdditiveQuantization", "decode"]
