"""Measuring models: perplexity, memory, decoding speed, and the demo that puts them in one table."""

from lowbit.bench.memory import bits_per_weight, checkpoint_bytes
from lowbit.bench.perplexity import Perplexity, check_seq_len, perplexity, token_windows

__all__ = ["Perplexity", "bits_per_weight", "check_seq_len", "checkpoint_bytes", "perplexity", "token_windows"]
