"""Attention over a compressed past: sinks and window exact, pages decoded tile by tile."""

from .dispatch import attend
from .inputs import ExactPast, PagedPast, Reader

__all__ = ["ExactPast", "PagedPast", "Reader", "attend"]
