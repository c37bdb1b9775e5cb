"""Kernels make a spec fast. The torch kernel runs every spec on any device; others are chosen where they fit."""

from lowbit.kernels.registry import Kernel, Problem, explain, kernel_named, register_kernel, select

__all__ = ["Kernel", "Problem", "explain", "kernel_named", "register_kernel", "select"]
