"""Capturing work on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_WARM_UPS = 2


class Captured(NamedTuple):
    """Work that can be done again.

    Attributes:
        replay: does it, over the same memory.
        output: what it gave; written again by every replay.
    """

    replay: Callable[[], None]
    output: Tensor


class Capture(Protocol):
    """Makes work repeatable."""

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        """Capture ``work``, which may be done several times meanwhile."""
        ...


class CudaCapture:
    """Captures CUDA graphs, which share one pool of memory: no two of them run at a time.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = None

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        """See ``Capture``."""
        with torch.cuda.device(self._device):
            self._warm_up(work)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are checked: others may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = work()
        return Captured(graph.replay, output)

    def _warm_up(self, work: Callable[[], Tensor]) -> None:
        """Have kernels compiled and libraries initialised, which a capture cannot do."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
