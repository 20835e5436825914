"""Packing stored values into page segments and back."""

from .torch_planes import pack, unpack

__all__ = ["pack", "unpack"]
