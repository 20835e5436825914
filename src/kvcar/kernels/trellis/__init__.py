"""A trellis over the tokens of a page: codes of ``b`` bits for values half a step apart.

A latent's *levels* are half a step apart and have ``b + 1`` bits. Its branches ``x``, one bit a token, say which of them a token may
have: the two lowest bits of level ``t`` are ``x[t] ^ x[t-1] ^ x[t-3]`` and below it ``x[t-2]``, with zeros before the page's first
token. So the lowest bit is known from tokens before, and ``b`` bits a token are stored: the branch and the level's upper bits.
Whoever encodes looks for the branches whose levels are nearest in all (``nearest_levels``); a reader needs no more than the branches of
three tokens before. Squared error is about a fifth less than with whole steps and as many bits.

Source: Marcellin and Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, 1990; the code of 8 states is
Ungerboeck's for amplitudes (1982), without feedback.
"""

from __future__ import annotations

from .bits import changes_of, levels_of, stored_codes, with_branches
from .search import SEARCH, Branches, nearest_levels

__all__ = ["SEARCH", "Branches", "changes_of", "levels_of", "nearest_levels", "stored_codes", "with_branches"]
