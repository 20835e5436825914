"""What a profile is, and what a fit by profile can be asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ..errors import InputError
from ..plan import CacheConfig
from .options import DEFAULT_TIMES_SMALLER


@dataclass(frozen=True)
class Profile:
    """Limits on how wide blocks may be.

    Attributes:
        widest_elements: elements of the widest block.
        flops_per_element: FLOPs per key or value element, the average over all; None for no limit.
        purpose: one line for help texts.
        flops_of: what is counted. "decoding": of decoding keys and values, as a prefill does. "step": of a decode step, in
            which keys are decoded and values are summed as latents; heads of a layer may then be coded apart.
        entropy_coded: whether sizes are those of a stored context, whose codes take their entropy.
        fit_tokens: tokens to fit on, unless told otherwise: blocks of thousands of elements at small sizes need many.
    """

    widest_elements: int
    flops_per_element: float | None
    purpose: str
    flops_of: Literal["decoding", "step"] = "decoding"
    entropy_coded: bool = False
    fit_tokens: int = 24_576


PROFILES = {
    "fast": Profile(1024, 60, "keys in narrow blocks, so that a decode step takes few FLOPs", flops_of="step"),
    "balanced": Profile(2048, 1200, "a few adjacent layers to a block"),
    "small": Profile(8192, None, "many or all layers to a block, for capacity"),
    "stored": Profile(
        8192, None, "contexts saved to disk, where codes take their entropy", entropy_coded=True, fit_tokens=65_536
    ),
}
DEFAULT_PROFILE = "balanced"


@dataclass(frozen=True)
class ProfileOptions:
    """Options of ``fit_profile``.

    Attributes:
        profile: one of ``PROFILES``.
        times_smaller: total bytes of the full bfloat16 cache over those of this one at 4,096 tokens, sinks and window
            included; with neither this nor ``max_kl``, 5.
        max_kl: KL divergence, nats per token, that the smallest such cache may cost on held-back text.
        effect_tokens: tokens on which the effect of errors is measured, forwards and backwards.
        window, sinks, page_tokens: see ``Plan``.
        seed: of everything random.
    """

    profile: str = DEFAULT_PROFILE
    times_smaller: float | None = None
    max_kl: float | None = None
    effect_tokens: int = 8192
    window: int = 64
    sinks: int = 4
    page_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise InputError(f"profile must be one of {', '.join(PROFILES)}, got {self.profile!r}")
        if self.times_smaller is not None and self.max_kl is not None:
            raise InputError("give times_smaller or max_kl, not both")
        for name in ("times_smaller", "max_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above 0, got {value:g}")
        if self.effect_tokens < 1:
            raise InputError("effect_tokens must be at least 1")
        CacheConfig(self.window, self.sinks, self.page_tokens)

    @property
    def target(self) -> float:
        """Times smaller that is aimed at where no divergence is."""
        return DEFAULT_TIMES_SMALLER if self.times_smaller is None else self.times_smaller

    @property
    def window_read(self) -> int:
        """Recent tokens that are read exactly: none after a stored context is loaded."""
        return 0 if PROFILES[self.profile].entropy_coded else self.window

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        """For a bundle's provenance."""
        return asdict(self) | {"codec": "linear"}
