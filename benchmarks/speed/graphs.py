"""Calls recorded in a CUDA graph, so that what is timed is the device and not the launching."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_WARM_UP = 2


def recorded(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Record ``calls`` one after the other; what is returned runs all of them.

    Raises:
        Exception: whatever a call says that cannot be recorded, such as one that waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay() -> object:
        graph.replay()
        return kept

    return replay
