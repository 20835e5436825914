"""Encoding tokens and packing them into pages as one operation."""

from .inputs import AffineEncoder, Writer
from .torch_units import encode_pages

__all__ = ["AffineEncoder", "Writer", "encode_pages"]
