"""Work that has to be done while Transformers makes a model, but not inside of what it sets up for that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from transformers import PreTrainedModel

Result = TypeVar("Result")
# Transformers takes this method away while it makes a model; whoever loads another one meanwhile needs it.
_TIE_WEIGHTS = PreTrainedModel.tie_weights


def outside(work: Callable[[threading.Event], Result]) -> Result:
    """Do something as if no model were being made.

    The thread's default device is the meta device meanwhile, the default dtype the model's, and weights aren't tied.

    Args:
        work: is given an event that is set when it should stop.
    """
    stop = threading.Event()
    with _defaults(), ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(work, stop).result()
        finally:
            stop.set()


@contextmanager
def _defaults() -> Iterator[None]:
    dtype, tie_weights = torch.get_default_dtype(), PreTrainedModel.tie_weights
    torch.set_default_dtype(torch.float32)
    PreTrainedModel.tie_weights = _TIE_WEIGHTS  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = tie_weights  # type: ignore[method-assign]
        torch.set_default_dtype(dtype)
