"""The command line: ``lowbit quantize | convert | inspect | eval | demo | doctor``."""

from lowbit.cli.app import main

__all__ = ["main"]
