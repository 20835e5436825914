"""What a model's configuration says beside its weights and shapes of what it computes: angles of RoPE, scales, activations.

Weights alone do not tell two models apart whose keys turn by other angles. Configurations differ among versions of transformers, so
only settings that both sides name are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

Setting = bool | int | float | str

# No part of what is computed from given token ids without dropout, or told by weights and geometry. Names of tokens differ
# between a checkpoint and one that was saved again, and so do names of files and versions.
_OF_NO_MATTER = re.compile(
    r"drop(out|_rate)?(_|$)|pdrop|token_id|_id$|init|coef|jitter|^use_cache$|pretraining_tp|positions|position_embeddings|^n_ctx$|vocab|^tie_|^output_|^summary_"
    r"|name|path|type$|version|precision|kernels?|fused|flash|checkpoint|^transformers"
)
_ROTARY = re.compile(r"^rope|^rotary")
MOST_SETTINGS = 256
_LONGEST = 64
_CLOSE = 1e-6


def settings_of(config: PreTrainedConfig) -> dict[str, Setting]:
    """Take the settings of the decoder of text, flat, by name."""
    config = config.get_text_config(decoder=True)
    own = {name: value for name, value in config.to_dict().items() if name not in _common_names()}
    return dict(sorted(_flat(own, ""))[:MOST_SETTINGS])


def differing_settings(wanted: Mapping[str, Setting], found: Mapping[str, Setting]) -> list[str]:
    """Name the settings that both have and that differ, with their values."""
    both = sorted(wanted.keys() & found.keys())
    return [f"{name}: {found[name]} instead of {wanted[name]}" for name in both if not _same(wanted[name], found[name])]


@cache
def _common_names() -> frozenset[str]:
    """What every configuration has, of whatever model."""
    return frozenset(PreTrainedConfig().to_dict())


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Setting]]:
    for name, value in values.items():
        inside_rotary = bool(prefix) or bool(_ROTARY.search(name))
        if isinstance(value, Mapping) and inside_rotary:
            yield from _flat({str(key): each for key, each in value.items()}, f"{prefix}{name}.")
        elif _is_setting(value) and (inside_rotary or not _OF_NO_MATTER.search(name)):
            yield f"{prefix}{name}", value


def _is_setting(value: object) -> TypeGuard[Setting]:
    return isinstance(value, Setting) and not (isinstance(value, str) and len(value) > _LONGEST)


def _same(wanted: Setting, found: Setting) -> bool:
    if isinstance(wanted, str) or isinstance(found, str):
        return wanted == found
    return math.isclose(wanted, found, rel_tol=_CLOSE, abs_tol=1e-30)
