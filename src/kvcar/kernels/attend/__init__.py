"""Attention over a compressed past: sinks and window exact, pages decoded tile by tile."""

from .inputs import ExactPast, PagedPast, Reader
from .dispatch import attend

__all__ = ["ExactPast", "PagedPast", "Reader", "attend"]
