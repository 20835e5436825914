"""The quantised caches that transformers itself has, as contenders.

As read in transformers 5.23 (``cache_utils.QuantizedLayer``): the first pass is quantised as a whole but attended to
exactly; from then on a pass reads the decoded past, the exact residual and itself. Once residual and pass together
reach ``residual_length``, *everything* is quantised anew, decoded tokens among it, and the residual is empty. There
are no sinks. Stepped in chunks of 64 with a residual of 128, the residual ends each chunk with 0 or 64 tokens.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from ..errors import InputError
from ..registry import Registry
from ..geometry import KVGeometry
from .contenders import Contender

RESIDUAL_TOKENS = 128
_GROUP_ELEMENTS = 64
EXTRA = "kvcar[compare]"


@dataclass(frozen=True)
class QuantizedSetting:
    """A backend of ``transformers.QuantizedCache`` and its options.

    Attributes:
        backend: quanto or hqq.
        bits: of each element.
        axis: the one that transformers' documentation recommends for the backend; both make groups of neighbouring
            elements of one head of one token.
    """

    backend: str
    bits: int
    axis: int

    @property
    def package(self) -> str:
        """What pip calls the backend's package."""
        return {"quanto": "optimum-quanto"}.get(self.backend, self.backend)

    @property
    def installed(self) -> bool:
        """Whether transformers finds the backend's package."""
        return bool({"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}[self.backend]())


QUANTIZED: Registry[QuantizedSetting] = Registry("quantised cache of transformers")
for _backend, _axis in (("quanto", 0), ("hqq", 1)):
    for _bits in (4, 2):
        QUANTIZED.register(f"{_backend}-{_bits}bit")(QuantizedSetting(_backend, _bits, _axis))


def quantized_contenders(
    config: PreTrainedConfig, geometry: KVGeometry, names: Sequence[str]
) -> tuple[list[Contender], dict[str, str]]:
    """Contenders, and the reason for each that is left out: its package is not installed, or layers slide.

    Raises:
        InputError: an unknown name, or a package that is installed but does not work.
    """
    found, missing = [], {}
    for name in names:
        setting = QUANTIZED[name]
        if geometry.sliding_layers:
            missing[name] = "transformers' QuantizedCache takes no model with sliding-window layers"
            continue
        if not setting.installed:
            missing[name] = f"{setting.package} is not installed (pip install '{EXTRA}')"
            continue
        found.append(_contender(name, setting, config, geometry))
    return found, missing


def _contender(name: str, setting: QuantizedSetting, config: PreTrainedConfig, geometry: KVGeometry) -> Contender:
    # A group must divide a head, so that it never mixes tokens and any number of tokens can be quantised.
    group = math.gcd(_GROUP_ELEMENTS, geometry.head_dim)

    def make() -> QuantizedCache:
        return QuantizedCache(
            setting.backend,
            config,
            nbits=setting.bits,
            axis_key=setting.axis,
            axis_value=setting.axis,
            q_group_size=group,
            residual_length=RESIDUAL_TOKENS,
        )

    _try_out(setting, make(), geometry)
    chosen = asdict(setting) | {"group_elements": group, "residual_tokens": RESIDUAL_TOKENS}
    return Contender(name, f"transformers {setting.backend}", make, chosen)


def _try_out(setting: QuantizedSetting, cache: QuantizedCache, geometry: KVGeometry) -> None:
    """Quantise and read a little, so that a backend that does not work is told before any measurement."""
    layer = geometry.codable_layers[0]
    tokens = torch.ones(1, geometry.kv_heads, 32, geometry.head_dim)
    # quanto compiles its unpacking when it first reads, with a ninja that lies beside this Python.
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{path}{os.pathsep}{scripts}"
    try:
        for _ in range(2):
            cache.update(tokens, tokens, layer)
    except Exception as error:
        raise InputError(
            f"{setting.package} is installed but cannot quantise here: {type(error).__name__}: {error}. It may need a C++ "
            "compiler the first time; install one, or leave the row out with --transformers"
        ) from error
    finally:
        os.environ["PATH"] = path
