"""Encoding into pages with PyTorch operations over all pages at once: any device, any codec."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pack import pack
from .inputs import Writer, check_pages


def encode_pages(x: Tensor, writer: Writer) -> Tensor:
    """Same as ``naive.encode_pages``."""
    shape = (check_pages(x, writer), writer.segment.page_tokens)
    if writer.encode is None or writer.codes is None:
        exact = x.to(writer.exact_dtype).contiguous().unflatten(1, shape)
        return exact.view(torch.uint8).flatten(2)
    return pack(writer.codes(writer.encode(x.float())).unflatten(1, shape), writer.segment)
