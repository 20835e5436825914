"""Codecs turn a block's vectors into latents and back. Adding one: a file here, one decorator, one import below."""

from .autoencoder import AutoencoderCodec
from .base import CODECS, Codec
from .checks import Stored, checked
from .identity import IdentityCodec
from .linear import LinearCodec
from .linear8 import Linear8Codec, RoundedMetric
from .quantizer import DynamicQuantizer, Quantizer, StaticQuantizer, TrellisQuantizer, read_quantizer
from .trainable import TrainableCodec

__all__ = [
    "CODECS",
    "AutoencoderCodec",
    "Codec",
    "DynamicQuantizer",
    "IdentityCodec",
    "Linear8Codec",
    "LinearCodec",
    "Quantizer",
    "RoundedMetric",
    "StaticQuantizer",
    "Stored",
    "TrainableCodec",
    "TrellisQuantizer",
    "checked",
    "read_quantizer",
]
