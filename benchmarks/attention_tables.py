"""Sections of ``docs/results/decode.md`` from the records of ``attention.py``."""

from __future__ import annotations


def attention_sections() -> list[str]:
    """All sections; none without records."""
    return []
