"""What a fit can be asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..codecs import CODECS
from ..errors import InputError
from ..plan import PACKED_BITS, RAW_BITS

DEFAULT_TIMES_SMALLER = 5.0


@dataclass(frozen=True)
class FitOptions:
    """Options of ``fit_bundle``.

    Attributes:
        codec: one of the registered codecs.
        bits: average stored bits per key or value element; excludes ``times_smaller``.
        times_smaller: total bytes of the full bfloat16 cache over those of this one at 4,096 tokens, sinks and
            window included. With neither, 5.
        layers_per_block, heads_per_block: slots coded together; heads None means all of a layer.
        latent_bits: bits of each latent of an autoencoder, 1 to 8 or 16.
        steps: training steps of an autoencoder, per block.
        window, sinks, page_tokens: see ``Plan``.
        seed: of everything random.
    """

    codec: str = "linear"
    bits: float | None = None
    times_smaller: float | None = None
    layers_per_block: int = 1
    heads_per_block: int | None = None
    latent_bits: int = 8
    steps: int = 200
    window: int = 64
    sinks: int = 4
    page_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _ = CODECS[self.codec]  # raises InputError for a codec that does not exist
        if self.bits is not None and self.times_smaller is not None:
            raise InputError("give bits or times_smaller, not both")
        if self.bits is not None and not 0 < self.bits <= RAW_BITS:
            raise InputError(f"bits per element must be above 0 and at most {RAW_BITS}, got {self.bits:g}")
        if self.times_smaller is not None and not self.times_smaller > 0:
            raise InputError(f"times_smaller must be above 0, got {self.times_smaller:g}")
        if self.latent_bits not in (*PACKED_BITS, RAW_BITS):
            raise InputError(f"latent bits must be 1 to 8, or 16, got {self.latent_bits}")
        if self.page_tokens < 32 or self.page_tokens % 32:
            raise InputError(f"a page must hold a multiple of 32 tokens, got {self.page_tokens}")
        if self.window < 0 or self.window % self.page_tokens:
            raise InputError(f"window must be 0 or a multiple of the page size, {self.page_tokens}; got {self.window}")
        if not 0 <= self.sinks <= min(self.page_tokens, 64):
            raise InputError(f"sinks must be 0 to {min(self.page_tokens, 64)}, got {self.sinks}")
        if self.steps < 0:
            raise InputError(f"training steps must not be negative, got {self.steps}")

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        """For a bundle's provenance."""
        return asdict(self)
