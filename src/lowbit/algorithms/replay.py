"""Running many small kernels without launching each from Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]
Inputs = tuple[Tensor, ...]
_KEPT = 6  # a block has four shapes, and last groups may be shorter


class Replayed:
    """A function of tensors that, on a GPU, is captured as a CUDA graph the first time that its shapes come up.

    The graphs of the last few shapes and their memory live as long as this object. What a call returns is valid until
    the next one.

    Args:
        work: launches kernels and neither asks for values nor keeps state.
        less: makes of the inputs smaller ones that use the same kernels; `work` meets them before the capture, during
            which nothing can be initialised.
    """

    def __init__(self, work: Work, less: Callable[[Inputs], Inputs]) -> None:
        self.work, self.less = work, less
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Inputs, Inputs]] = {}

    def __call__(self, *inputs: Tensor) -> Inputs:
        """The results of `work`, from a replay where there is a graph."""
        if not inputs[0].is_cuda:
            return self.work(*inputs)
        key = tuple(tensor.shape for tensor in inputs)
        if key not in self._graphs:
            if len(self._graphs) >= _KEPT:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._capture(inputs)
        graph, kept, results = self._graphs[key]
        for mine, theirs in zip(kept, inputs, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return results

    def _capture(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, Inputs]:
        current, stream = torch.cuda.current_stream(inputs[0].device), torch.cuda.Stream(inputs[0].device)
        kept = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.work(*(tensor.clone() for tensor in self.less(kept)))
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = self.work(*kept)
        return graph, kept, results
