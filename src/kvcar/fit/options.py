"""What a fit can be asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ..codecs import CODECS
from ..errors import InputError
from ..plan import PACKED_BITS, RAW_BITS, CacheConfig, Reuse, Scales

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
        layers: layers to compress, the others stay exact; None means all that can be.
        key_latents, value_latents: latents of a whole layer's keys and of its values, ``latent_bits`` each, instead of
            a budget of bits; a block of fewer heads gets its share. The paper's ``d``, ``D / 2`` there.
        reuses: slots that store nothing and read another one's reconstruction.
        latent_bits: bits of each latent of an autoencoder, or of every kept latent when their number is given; 1 to 8
            or 16.
        scales: see ``Block``; "dynamic" needs ``latent_bits`` of 1 to 8 for every latent.
        steps: training steps of an autoencoder, per block.
        window, sinks, page_tokens: see ``Plan``.
        seed: of everything random.
        metric: what a block's directions are chosen by: "std" (each element over its standard deviation) or "effect" (the
            measured effect of errors on the model's output; bits and latents of all blocks then share one budget).
        effect_tokens: tokens that the effect is measured on.
    """

    codec: str = "linear"
    bits: float | None = None
    times_smaller: float | None = None
    layers_per_block: int = 1
    heads_per_block: int | None = None
    layers: tuple[int, ...] | None = None
    key_latents: int | None = None
    value_latents: int | None = None
    reuses: tuple[Reuse, ...] = ()
    latent_bits: int = 8
    scales: Scales = "static"
    steps: int = 200
    window: int = 64
    sinks: int = 4
    page_tokens: int = 64
    seed: int = 0
    metric: Literal["std", "effect"] = "std"
    effect_tokens: int = 6144

    def __post_init__(self) -> None:
        _ = CODECS[self.codec]  # raises InputError for a codec that does not exist
        if self.bits is not None and self.times_smaller is not None:
            raise InputError("give bits or times_smaller, not both")
        if self.bits is not None and not 0 < self.bits <= RAW_BITS:
            raise InputError(f"bits per element must be above 0 and at most {RAW_BITS}, got {self.bits:g}")
        if self.times_smaller is not None and not self.times_smaller > 0:
            raise InputError(f"times_smaller must be above 0, got {self.times_smaller:g}")
        self._check_latents()
        if self.latent_bits not in (*PACKED_BITS, RAW_BITS):
            raise InputError(f"latent bits must be 1 to 8, or 16, got {self.latent_bits}")
        CacheConfig(self.window, self.sinks, self.page_tokens)
        if self.scales not in ("static", "dynamic"):
            raise InputError(f"scales must be static or dynamic, got {self.scales!r}")
        if self.metric not in ("std", "effect"):
            raise InputError(f"metric must be std or effect, got {self.metric!r}")
        if self.effect_tokens < 1:
            raise InputError(f"effect_tokens must be at least 1, got {self.effect_tokens}")
        if self.steps < 0:
            raise InputError(f"training steps must not be negative, got {self.steps}")

    def _check_latents(self) -> None:
        given = (self.key_latents, self.value_latents)
        if given.count(None) == 1:
            raise InputError("give key_latents and value_latents together")
        if None not in given:
            if self.bits is not None or self.times_smaller is not None:
                raise InputError(
                    "key_latents and value_latents fix the size; give no bits and no times_smaller with them"
                )
            if self.codec == "identity":
                raise InputError("the identity codec keeps every element; latents need a linear or autoencoder codec")
            if min(n for n in given if n is not None) < 1:
                raise InputError(f"latents must be at least 1, got {given[0]} and {given[1]}")
        if self.scales == "dynamic" and (self.latent_bits == RAW_BITS or (self.codec == "linear" and None in given)):
            raise InputError(
                "dynamic scales need the same 1 to 8 latent bits everywhere: give latent_bits, and for the linear codec "
                "key_latents and value_latents too"
            )

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        """For a bundle's provenance; the plan holds the reuses themselves."""
        plain = asdict(self) | {"reuses": len(self.reuses)}
        plain["layers"] = None if self.layers is None else " ".join(map(str, self.layers))
        return plain
