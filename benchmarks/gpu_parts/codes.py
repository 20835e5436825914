"""The codes that are timed: latents by bits as fits gave them."""

from __future__ import annotations

from speed.synthetic import Codes

from kvcar.geometry import KVGeometry

# Shares of bits of the demo model's fit, for heads of 128.
_FAST = ({8: 9, 7: 12, 6: 20, 5: 29, 4: 2}, {8: 7, 7: 18, 6: 26, 5: 25, 4: 24, 3: 2})
# A layer's keys and values in one block of 2,048 elements at 8 times smaller, shared by the spectrum of the demo model's layers
# (``scale.SPECTRUM``).
_BALANCED = ({8: 4, 7: 17, 6: 25, 5: 76, 4: 176, 3: 359, 2: 390, 1: 198},)
_WIDTHS = {"fast": 128, "balanced": 2048}


def codes_for(name: str, geometry: KVGeometry) -> Codes:
    """Codes by profile for a cache, with as many latents an element as at an 8B model's shape."""
    given, heads = (_FAST, 1) if name == "fast" else (_BALANCED, geometry.kv_heads)
    width = heads * geometry.head_dim * (2 if name == "balanced" else 1)
    scaled = [{bits: round(count * width / _WIDTHS[name]) for bits, count in own.items()} for own in given]
    return Codes.of("linear8", heads, *scaled)
