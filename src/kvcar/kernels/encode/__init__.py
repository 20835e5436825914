"""Encoding tokens and packing them into pages as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import backend_for
from ..pack import pack
from .inputs import ENCODING, AffineEncoder, Writer, check_pages

__all__ = ["ENCODING", "AffineEncoder", "Writer", "encode_pages", "encode_pages_in_torch"]


def encode_pages(x: Tensor, writer: Writer) -> Tensor:
    """Compute the same as ``naive.encode_pages``, by the backend of the tensor's device."""
    return ENCODING.choose(backend_for(x.device), "any", x, writer)(x, writer)


@ENCODING.register("torch")
def encode_pages_in_torch(x: Tensor, writer: Writer) -> Tensor:
    """Compute the same as ``naive.encode_pages``, with operations over all pages at once: any device, any codec."""
    shape = (check_pages(x, writer), writer.segment.page_tokens)
    if writer.encode is None or writer.codes is None:
        exact = x.to(writer.exact_dtype).contiguous().unflatten(1, shape)
        return exact.view(torch.uint8).flatten(2)
    return pack(writer.codes(writer.encode(x.float())).unflatten(1, shape), writer.segment)
