"""What a cache needs of the model that it is used with."""

from __future__ import annotations

from typing import Protocol

from ..bundle import Bundle
from ..kernels.rotary import RotaryTable
from .coder import PageCoder


class Host(Protocol):
    """An attached model, as its caches see it."""

    def check_bundle(self, bundle: Bundle) -> None:
        """Refuse a bundle of another model."""
        ...

    def coder(self, bundle: Bundle) -> PageCoder:
        """The bundle made ready for the model's device and dtype."""
        ...

    def rotary(self, layer: int) -> RotaryTable | None:
        """How a layer rotates its keys; None where it does not, or where no pass has shown it yet."""
        ...
