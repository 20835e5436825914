"""The contract of a rival method: say which tokens stay exact, encode the others, decode from what was stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from kvcar.geometry import Kind

from .stored import Stored


@dataclass(frozen=True)
class Places:
    """Which tokens of a sequence stay exact. The defaults are kvcar's.

    Attributes:
        sinks: first tokens, kept for ever.
        window: most recent tokens that are never coded.
        block: tokens that leave the window together.
    """

    sinks: int = 4
    window: int = 64
    block: int = 64

    def coded_until(self, seen: int) -> int:
        """Tokens, counted from the start, that are no longer exact once ``seen`` have passed (sinks apart)."""
        return max(0, seen - self.window) // self.block * self.block

    def exact(self, seen: int) -> int:
        """Tokens held exactly once ``seen`` have passed."""
        coded = self.coded_until(seen)
        return seen - coded + min(self.sinks, coded)


AS_KVCAR: Mapping[Kind, Places] = MappingProxyType({"key": Places(), "value": Places()})


class Method(ABC):
    """A way to code keys and values.

    Attributes:
        family: what a plot calls the method in all its sizes.
        keys_before_rope: whether keys are coded before RoPE.
        places: which tokens stay exact, for keys and for values.
        config: what was chosen, for the record; JSON-ready.
    """

    family: str
    keys_before_rope: bool = False
    places: Mapping[Kind, Places] = AS_KVCAR
    config: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def encode(self, kind: Kind, x: Tensor) -> Stored:
        """Encode tokens that leave the window together.

        Args:
            kind: keys or values.
            x: float32 ``[L, H, N, D]``, all layers that attend to the whole past; ``N`` is below a block only where
                sinks are left out of the first one.
        """

    @abstractmethod
    def decode(self, kind: Kind, stored: Stored) -> Tensor:
        """What was encoded, float32 ``[L, H, N, D]``, from what is stored alone."""

    def stored_bits(self, stored: Stored) -> int:
        """Bits that these tokens take; packed without gaps, unless a method has an entropy coder."""
        return stored.bits
