"""What a fit can be asked for: a size or a divergence, and a profile that searches the structure or a structure that is given."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Literal

from ..codecs import CODECS
from ..errors import InputError, require
from ..plan import PACKED_BITS, RAW_BITS, CacheConfig, Reuse, Scales

DEFAULT_PROFILE = "balanced"
DEFAULT_TIMES_SMALLER = 5.0
DEFAULT_CACHE = CacheConfig()

Metric = Literal["std", "effect"]


@dataclass(frozen=True)
class Profile:
    """Limits within which the structure is searched.

    Attributes:
        widest_elements: elements of the widest block.
        flops_per_element: FLOPs per key or value element, the average over all; None for no limit.
        purpose: one line for help texts.
        flops_of: what is counted. "decoding": of decoding keys and values, as a prefill does. "step": of a decode step, in
            which keys are decoded and values are summed as latents; heads of a layer may then be separate blocks.
        entropy_coded: whether sizes are those of a stored context, whose codes take their entropy.
        fit_tokens: tokens to fit on by default: blocks of thousands of elements at small sizes need many.
        memory_tokens: tokens in memory, of all sequences together, that share the bytes of codecs by default.
        page_means: whether pages store what the errors of their tokens have in common.
        trellis: whether codes stand for half steps; see ``Block``.
    """

    widest_elements: int
    flops_per_element: float | None
    purpose: str
    flops_of: Literal["decoding", "step"] = "decoding"
    entropy_coded: bool = False
    fit_tokens: int = 24_576
    memory_tokens: int = 65_536
    page_means: bool = True
    trellis: bool = True


PROFILES = {
    "fast": Profile(1024, 60, "keys in narrow blocks, so that a decode step takes few FLOPs", flops_of="step"),
    "balanced": Profile(2048, 1200, "a few adjacent layers to a block", memory_tokens=32_768),
    "small": Profile(8192, None, "many or all layers to a block, for capacity", memory_tokens=524_288),
    "stored": Profile(
        8192,
        None,
        "contexts saved to disk, where codes take their entropy",
        entropy_coded=True,
        fit_tokens=65_536,
        page_means=False,
        trellis=False,
    ),
}


@dataclass(frozen=True)
class Structure:
    """Blocks and codecs as given, instead of searched by a profile.

    Attributes:
        codec: one of the registered codecs. The identity codec without ``bits`` or a size is lossless.
        bits: average stored bits per key or value element, instead of ``times_smaller``.
        layers_per_block, heads_per_block: slots coded together; heads None means all of a layer.
        layers: layers to compress, the others stay exact; None means all that can be.
        key_latents, value_latents: latents of a whole layer's keys and of its values, ``latent_bits`` each, instead of
            a budget of bits; a block of fewer heads gets its share. The paper's ``d``, ``D / 2`` there.
        reuses: slots that store nothing and read another one's reconstruction.
        latent_bits: bits of each latent of an autoencoder, or of every kept latent when their number is given; 1 to 8
            or 16.
        scales: see ``Block``; "dynamic" needs ``latent_bits`` of 1 to 8 for every latent.
        metric: what a block's directions are chosen by: "std" (each element over its standard deviation) or "effect" (the
            measured effect of errors on the model's output; bits and latents of all blocks then share one budget).
        steps: training steps of an autoencoder, per block.
        page_means: whether pages store what the errors of their tokens have in common; for the linear8 codec.
        trellis: whether codes stand for half steps (see ``Block``); for the linear8 codec.

    Raises:
        InputError: values that are out of range or exclude each other.
    """

    codec: str = "linear"
    bits: float | None = None
    layers_per_block: int = 1
    heads_per_block: int | None = None
    layers: tuple[int, ...] | None = None
    key_latents: int | None = None
    value_latents: int | None = None
    reuses: tuple[Reuse, ...] = ()
    latent_bits: int = 8
    scales: Scales = "static"
    metric: Metric = "std"
    steps: int = 200
    page_means: bool = False
    trellis: bool = False

    def __post_init__(self) -> None:
        require(str, codec=self.codec, scales=self.scales, metric=self.metric)
        require(float, optional=True, bits=self.bits)
        require(int, layers_per_block=self.layers_per_block, latent_bits=self.latent_bits, steps=self.steps)
        optional = ("heads_per_block", "key_latents", "value_latents")
        require(int, optional=True, **{name: getattr(self, name) for name in optional})
        require(tuple, layers=self.layers or (), reuses=self.reuses)
        for layer in self.layers or ():
            require(int, layers=layer)
        for reuse in self.reuses:
            require(Reuse, reuses=reuse)
        _ = CODECS[self.codec]  # raises InputError for a codec that does not exist
        if self.bits is not None and not 0 < self.bits <= RAW_BITS:
            raise InputError(f"bits per element must be above 0 and at most {RAW_BITS}, got {self.bits:g}")
        if self.latent_bits not in (*PACKED_BITS, RAW_BITS):
            raise InputError(f"latent bits must be 1 to 8, or 16, got {self.latent_bits}")
        if self.scales not in ("static", "dynamic"):
            raise InputError(f"scales must be static or dynamic, got {self.scales!r}")
        if self.metric not in ("std", "effect"):
            raise InputError(f"metric must be std or effect, got {self.metric!r}")
        if self.codec == "linear8" and (self.metric != "effect" or self.key_latents is not None):
            raise InputError(
                "the linear8 codec is made of the measured effect of errors and gives latents whole bits: ask for metric='effect', "
                "and for a size in place of key_latents and value_latents"
            )
        require(bool, page_means=self.page_means, trellis=self.trellis)
        if self.page_means and self.codec != "linear8":
            raise InputError(f"page_means needs the linear8 codec, which knows what errors cost; got {self.codec!r}")
        if self.trellis and self.codec != "linear8":
            raise InputError(f"a trellis needs the linear8 codec, got {self.codec!r}")
        if self.steps < 0:
            raise InputError(f"training steps must not be negative, got {self.steps}")
        self._check_latents()

    def _check_latents(self) -> None:
        given = [n for n in (self.key_latents, self.value_latents) if n is not None]
        if len(given) == 1:
            raise InputError("give key_latents and value_latents together")
        if given and self.bits is not None:
            raise InputError("key_latents and value_latents fix the size; give no bits with them")
        if given and self.codec == "identity":
            raise InputError("the identity codec keeps every element; latents need a linear or autoencoder codec")
        if given and min(given) < 1:
            raise InputError(f"latents must be at least 1, got {given[0]} and {given[1]}")
        if self.scales == "dynamic" and (self.latent_bits == RAW_BITS or (self.codec == "linear" and not given)):
            raise InputError(
                "dynamic scales need the same 1 to 8 latent bits everywhere: give latent_bits, and for the linear codec "
                "key_latents and value_latents too"
            )

    @property
    def latents(self) -> tuple[int, int] | None:
        """Latents of a layer's keys and of its values, where their number is given."""
        if self.key_latents is None or self.value_latents is None:
            return None
        return self.key_latents, self.value_latents


@dataclass(frozen=True)
class FitOptions:
    """Options of one fit.

    Attributes:
        times_smaller: total bytes of the full cache over those of this one at 4,096 tokens, sinks and window included,
            both of a model that runs in bfloat16. With neither this nor ``max_kl`` nor a structure that fixes the size, 5.
        max_kl: KL divergence, nats per token, that the smallest such cache may cost on held-out text.
        profile: one of ``PROFILES``, within whose limits the structure is searched; None means balanced.
        structure: blocks and codecs as given, instead of a profile.
        cache: sinks, window and pages.
        effect_tokens: tokens on which the effect of errors is measured, forwards and backwards.
        seed: of everything random.
        memory_tokens: tokens in memory, of all sequences together, among which the search shares the bytes of codecs: at fewer
            it finds smaller codecs, at more smaller errors. Default: the profile's.

    Raises:
        InputError: values that are out of range or exclude each other.
    """

    times_smaller: float | None = None
    max_kl: float | None = None
    profile: str | None = None
    structure: Structure | None = None
    cache: CacheConfig = DEFAULT_CACHE
    effect_tokens: int = 16_384
    seed: int = 0
    memory_tokens: int | None = None

    def __post_init__(self) -> None:
        require(float, optional=True, times_smaller=self.times_smaller, max_kl=self.max_kl)
        require(int, effect_tokens=self.effect_tokens, seed=self.seed)
        require(int, optional=True, memory_tokens=self.memory_tokens)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be 0 to 2^63 - 1, got {self.seed}")
        require(str, optional=True, profile=self.profile)
        require(Structure, optional=True, structure=self.structure)
        require(CacheConfig, cache=self.cache)
        if self.times_smaller is not None and not 1 < self.times_smaller < math.inf:
            raise InputError(f"times_smaller must be above 1 (the model's own cache), got {self.times_smaller:g}")
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise InputError(f"max_kl must be above 0, got {self.max_kl:g}")
        if self.times_smaller is not None and self.max_kl is not None:
            raise InputError("give times_smaller or max_kl, not both")
        for name in ("effect_tokens", "memory_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.profile is not None and self.profile not in PROFILES:
            raise InputError(f"profile must be one of {', '.join(PROFILES)}, got {self.profile!r}")
        if self.structure is not None:
            self._check_structure(self.structure)

    def _check_structure(self, structure: Structure) -> None:
        if self.profile is not None or self.max_kl is not None:
            raise InputError("profile and max_kl search the structure, and structure fixes it; give one of them")
        if self.times_smaller is not None:
            if structure.bits is not None:
                raise InputError("give bits or times_smaller, not both")
            if structure.latents is not None:
                raise InputError("key_latents and value_latents fix the size; give no times_smaller with them")

    @cached_property
    def limits(self) -> Profile | None:
        """Limits of the search; None for a given structure."""
        return PROFILES[self.profile or DEFAULT_PROFILE] if self.structure is None else None

    @property
    def codec(self) -> str:
        """Codec of every block."""
        return "linear8" if self.structure is None else self.structure.codec

    @property
    def page_means(self) -> bool:
        """Whether pages store what the errors of their tokens have in common."""
        return (
            self.limits.page_means
            if self.limits is not None
            else self.structure is not None and self.structure.page_means
        )

    @property
    def trellis(self) -> bool:
        """Whether codes stand for half steps; see ``Block``."""
        return self.limits.trellis if self.limits is not None else self.structure is not None and self.structure.trellis

    @property
    def metric(self) -> Metric:
        """What directions are chosen by."""
        return "effect" if self.structure is None else self.structure.metric

    @property
    def lossless(self) -> bool:
        """Whether blocks keep what they are given; the default of the identity codec."""
        given = self.structure
        return given is not None and given.codec == "identity" and given.bits is None and self.times_smaller is None

    @property
    def entropy_coded(self) -> bool:
        """Whether sizes are those of a stored context."""
        return self.limits is not None and self.limits.entropy_coded

    @property
    def target(self) -> float:
        """Times smaller that is aimed at where no divergence is."""
        return DEFAULT_TIMES_SMALLER if self.times_smaller is None else self.times_smaller

    @property
    def tokens_in_memory(self) -> int:
        """Tokens that share the bytes of codecs."""
        default = PROFILES[self.profile or DEFAULT_PROFILE].memory_tokens
        return default if self.memory_tokens is None else self.memory_tokens

    @property
    def window_read(self) -> int:
        """Recent tokens that are read exactly: none after a stored context is loaded."""
        return 0 if self.entropy_coded else self.cache.window

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        """Everything on one level, for a bundle's provenance; the plan holds the reuses themselves."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        del own["cache"], own["structure"], own["profile"], own["max_kl"]
        plain = own | asdict(self.cache)
        if self.structure is None:
            return plain | {"profile": self.profile or DEFAULT_PROFILE, "max_kl": self.max_kl, "codec": self.codec}
        given = asdict(self.structure) | {"reuses": len(self.structure.reuses)}
        given["layers"] = None if self.structure.layers is None else " ".join(map(str, self.structure.layers))
        return plain | given
