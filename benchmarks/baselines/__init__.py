"""Rival methods, written from the ideas of their papers, to be stepped beside kvcar's caches. No part of the product.

``BASELINES`` lists them; each entry makes a ``Method`` from a ``Calibration``.
"""

from . import kivi, kvtc, palu, turboquant
from .base import Method, Places
from .cache import BaselineCache
from .calibration import Calibration
from .registry import BASELINES
from .stored import Stored

__all__ = [
    "BASELINES",
    "BaselineCache",
    "Calibration",
    "Method",
    "Places",
    "Stored",
    "kivi",
    "kvtc",
    "palu",
    "turboquant",
]
