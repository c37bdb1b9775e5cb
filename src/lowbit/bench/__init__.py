"""Measuring models: perplexity, distance from a reference, memory, decoding speed, and the demo of them all."""

from lowbit.bench.divergence import Comparison, check_vocabularies, compare
from lowbit.bench.memory import bits_per_weight, checkpoint_bytes
from lowbit.bench.perplexity import Perplexity, check_seq_len, perplexity, token_windows

__all__ = [
    "Comparison",
    "Perplexity",
    "bits_per_weight",
    "check_seq_len",
    "check_vocabularies",
    "checkpoint_bytes",
    "compare",
    "perplexity",
    "token_windows",
]
