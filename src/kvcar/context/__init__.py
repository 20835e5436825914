"""Lossless coding of integer codes: how many bits they need, and a coder that takes about as many."""

from .coder import decode_codes, encode_codes
from .size import entropy_bits_per_token

__all__ = ["decode_codes", "encode_codes", "entropy_bits_per_token"]
