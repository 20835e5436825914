"""Attention over a compressed past: sinks and window exact, pages decoded tile by tile."""

from .dispatch import attend
from .inputs import ExactPast, Held, PagedPast, Reader

__all__ = ["ExactPast", "Held", "PagedPast", "Reader", "attend"]
