"""Caches to compare: each with a name and a way to make an empty one; bundles, and the noise floor among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from ..bundle import Bundle
from ..fit.fit import fit_bundle
from ..fit.options import FitOptions
from ..text import TextSource
from ..cache.cache import KVCarCache
from .fidelity import Fidelity, measure_fidelity

# Each cache of transformers holds every token in the model's dtype while it is stepped, so memory sets the limit.
SIDE_BY_SIDE = 8
NOISE_FLOOR = "identity"


@dataclass(frozen=True)
class Contender:
    """One cache of a comparison.

    Attributes:
        name: of its row.
        family: rows of one family make one line of a plot.
        make: makes an empty cache of transformers, of any class.
        config: what was chosen, for the record; JSON-ready.
    """

    name: str
    family: str
    make: Callable[[], Cache]
    config: dict[str, Any] = field(default_factory=dict)


def bundle_contender(name: str, bundle: Bundle, window: int | None = None) -> Contender:
    """A bundle's compressed cache; raises InputError as ``KVCarCache`` does."""
    KVCarCache(bundle, window)
    config = {
        "window": bundle.plan.window if window is None else window,
        "codec_bytes": bundle.codec_bytes,
        "fit": bundle.fit.model_dump(mode="json"),
    }
    return Contender(name, _family(bundle), lambda: KVCarCache(bundle, window, keep_decoded=True), config)


def _family(bundle: Bundle) -> str:
    """Bundles that differ only in size are one family."""
    if profile := bundle.fit.options.get("profile"):
        return f"kvcar {profile}"
    codecs = "+".join(sorted({block.codec for block in bundle.plan.blocks})) or "reuse"
    layers = max((len({slot.layer for slot in block.slots}) for block in bundle.plan.blocks), default=1)
    return f"kvcar {codecs}" + (f", {layers} layers" if layers > 1 else "")


def noise_floor(model: PreTrainedModel, name: str) -> tuple[Contender, Bundle]:
    """A bundle that stores every key and value as the model computed it: what it differs by is rounding.

    Its bundle serves to attach the model.
    """
    unread = torch.zeros(1, 2, dtype=torch.int64)  # a lossless bundle is fitted on nothing
    nothing = TextSource("none", "", "0" * 64)
    bundle = fit_bundle(model, name, unread, nothing, FitOptions(codec="identity"))
    return Contender(NOISE_FLOOR, "noise floor", lambda: KVCarCache(bundle)), bundle


def compare(
    model: PreTrainedModel,
    windows: torch.Tensor,
    contenders: Sequence[Contender],
    on_chunk: Callable[[int], None] | None = None,
    side_by_side: int = SIDE_BY_SIDE,
) -> Iterator[tuple[Contender, Fidelity]]:
    """Step contenders over the same text, ``side_by_side`` of them sharing each pass of the full cache.

    Args:
        model: attached, if bundles are among the contenders.
        windows: token ids int64 ``[N, context]``.
        contenders: with names of their own.
        on_chunk: told after every chunk how many tokens it had, once for each group that shares a pass.
        side_by_side: most caches that exist at once, beside the full one.
    """
    for group in groups(contenders, side_by_side):
        results = measure_fidelity(model, windows, {c.name: c.make for c in group}, on_chunk)
        yield from ((contender, results[contender.name]) for contender in group)


def groups(contenders: Sequence[Contender], side_by_side: int) -> list[Sequence[Contender]]:
    """Contenders in groups of at most ``side_by_side``."""
    return [contenders[first : first + side_by_side] for first in range(0, len(contenders), side_by_side)]
