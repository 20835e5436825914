"""Where Triton's kernels are tested: natively on CUDA if there is any, on the CPU under the interpreter if not.

``conftest.py`` chooses the interpreter. A test module that imports this is left out where Triton does not exist.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux alone")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``torch.empty`` give NaN, or bytes of ones, so that reading what was never written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 255 if out.dtype == torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
