"""The list of baselines."""

from __future__ import annotations

from collections.abc import Callable

from kvcar.registry import Registry

from .base import Method
from .calibration import Calibration

BASELINES: Registry[Callable[[Calibration], Method]] = Registry("baseline")
"""Row name -> makes the method, fitted if it needs fitting."""
