"""The command line: ``lowbit quantize | inspect | eval | demo | doctor``."""

from lowbit.cli.app import main

__all__ = ["main"]
