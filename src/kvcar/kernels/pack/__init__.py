"""Packing stored values into page segments and back."""

from .dispatch import pack, unpack

__all__ = ["pack", "unpack"]
