"""Encoding tokens and packing them into pages as one operation."""

from .dispatch import encode_pages
from .inputs import AffineEncoder, Writer

__all__ = ["AffineEncoder", "Writer", "encode_pages"]
