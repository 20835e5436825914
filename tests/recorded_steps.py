"""CUDA graphs on a CPU: what a step does is recorded, and replayed over the same memory with the same numbers.

As in a CUDA graph, nothing that Python decided while it was recorded is decided again: every operation of PyTorch and every launch
of Triton's interpreter is repeated with the arguments it had, and its results are written to where they were then. What a
graph could not do, to look at a tensor's contents from Python, is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from kvcar.runtime.graphs.capture import Captured

# They wait for the device, or send it data from Python, which a capture does not survive.
_REFUSED = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "lift_fresh", "item")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        name = func._schema.name.removeprefix("aten::")
        assert name not in _REFUSED, f"{name} while a step is captured"
        assert not (name in ("index", "index_put_") and any(_is_mask(i) for i in args[1])), "indexed by a mask"
        given = kwargs or {}
        out = func(*args, **given)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.calls.append(lambda: _again(func, args, given, outputs))
        return out

    def launch(self, executor, args, kwargs) -> None:
        self.launches += 1
        self.calls.append(lambda: executor(*args, **kwargs))


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _again(func, args, kwargs, outputs) -> None:
    found = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for old, new in zip(outputs, found, strict=True):
        # Views and results of in-place operations are where they were.
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


class RecordedCapture:
    """Stands in for ``CudaCapture``.

    Attributes:
        captures: how many steps were captured; launches: Triton's launches in the last of them; replays: of all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = self.launches = 0
        self._recorder: _Recorder | None = None
        # Models ask, and leave out what looks at their input.
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self._recorder is not None)
        original = interpreter.GridExecutor.__call__

        def launched(executor, *args, **kwargs):
            recorder = self._recorder
            with _disable_current_modes():
                original(executor, *args, **kwargs)
            if recorder is not None:
                recorder.launch(executor, args, kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        """See ``kvcar.runtime.graphs.capture.Capture``."""
        work()
        self._recorder = _Recorder()
        try:
            with self._recorder as recorder:
                output = work()
        finally:
            self._recorder = None
        self.captures += 1
        self.launches = recorder.launches

        def replay() -> None:
            self.replays += 1
            for call in recorder.calls:
                call()

        return Captured(replay, output)
