"""Encoding by the backend of the device; what Triton does not serve goes to PyTorch, and is told."""

from __future__ import annotations

from torch import Tensor

from ..backend import backend_for, tell_once
from . import torch_units
from .inputs import Writer


def encode_pages(x: Tensor, writer: Writer) -> Tensor:
    """Same as ``naive.encode_pages``."""
    if backend_for(x.device) == "triton":
        from . import triton  # only here: importing it needs Triton

        reason = triton.serves(x, writer)
        if reason is None:
            return triton.encode_pages(x, writer)
        tell_once("encoding", "triton", reason)
    return torch_units.encode_pages(x, writer)
