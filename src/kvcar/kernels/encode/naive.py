"""The specification: codec, quantiser and the packing of ``docs/format.md``, page by page, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pack import naive
from .inputs import Writer, check_pages


def encode_pages(x: Tensor, writer: Writer) -> Tensor:
    """Encode vectors ``x`` float32 ``[B, N, W]`` into packed segments uint8 ``[B, pages, size]``.

    Args:
        x: vectors of the unit's slots side by side, ``N`` a multiple of the page's tokens; keys before RoPE, those of
            a lossless segment after it.
        writer: how the unit is encoded.

    Raises:
        InputError: ``N`` is no multiple of the page's tokens.
    """
    segment, pages = writer.segment, check_pages(x, writer)
    out = torch.zeros(x.shape[0], pages, segment.size, dtype=torch.uint8)
    for sequence in range(x.shape[0]):
        for page in range(pages):
            own = x[sequence, page * segment.page_tokens : (page + 1) * segment.page_tokens].float().cpu()
            out[sequence, page] = _encode_page(own, writer)
    return out.to(x.device)


def _encode_page(x: Tensor, writer: Writer) -> Tensor:
    if writer.encode is None or writer.codes is None:
        return x.to(writer.exact_dtype).view(torch.uint8).flatten()
    return naive.pack(writer.codes(writer.encode(x)), writer.segment)
