"""Caches to compare: each with a name and a way to make an empty one.

Bundles, the noise floor among them, and the quantised caches that transformers itself has. As read in transformers 5.23
(``cache_utils.QuantizedLayer``): their first pass is quantised as a whole but attended to exactly; from then on a pass
reads the decoded past, the exact residual and itself. Once residual and pass together reach ``residual_length``,
*everything* is quantised anew, decoded tokens among it, and the residual is empty. There are no sinks. Stepped in chunks
of 64 with a residual of 128, the residual ends each chunk with 0 or 64 tokens.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.file_baton import FileBaton
from transformers import Cache, PreTrainedConfig, PreTrainedModel, QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from kvcar.bundle import Bundle
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.fidelity import Fidelity, measure_fidelity
from kvcar.fit.fit import lossless
from kvcar.geometry import KVGeometry
from kvcar.registry import Registry

# Each cache of transformers holds every token in the model's dtype while it is stepped, so memory sets the limit.
SIDE_BY_SIDE = 6
NOISE_FLOOR = "identity"
RESIDUAL_TOKENS = 128
_GROUP_ELEMENTS = 64
# Building an extension takes half a minute; a lock that is older was left by a run that was killed.
_LOCK_SECONDS = 300


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
    """Make a bundle's compressed cache a contender; raises InputError as ``KVCarCache`` does."""
    KVCarCache(bundle, window)
    config = {
        "window": bundle.plan.window if window is None else window,
        "codec_bytes": bundle.codec_bytes,
        "fit": bundle.fit.model_dump(mode="json"),
    }
    return Contender(name, _family(bundle), lambda: KVCarCache(bundle, window), config)


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
    bundle = lossless(model, name=name)
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
        on_chunk: called after every chunk with the tokens it had, once for each group that shares a pass.
        side_by_side: caches that exist at once, beside the full one.
    """
    for group in groups(contenders, side_by_side):
        results = measure_fidelity(model, windows, {c.name: c.make for c in group}, on_chunk)
        yield from ((contender, results[contender.name]) for contender in group)


def groups(contenders: Sequence[Contender], side_by_side: int) -> list[Sequence[Contender]]:
    """Contenders in groups of at most ``side_by_side``."""
    return [contenders[first : first + side_by_side] for first in range(0, len(contenders), side_by_side)]


def named_bundles(given: Sequence[str]) -> dict[str, Bundle]:
    """Load bundles of ``NAME=PATH`` or ``PATH``, by name.

    Raises:
        InputError: two bundles of one name.
        BundleError: a folder that holds no bundle.
    """
    bundles: dict[str, Bundle] = {}
    for each in given:
        name, separator, path = each.partition("=")
        # A folder whose own name has a "=" in it is taken as it is.
        if not separator or Path(each).is_dir():
            name, path = Path(each).resolve().name, each
        if name in bundles or name in QUANTIZED:
            raise InputError(
                f"two rows would be called {name!r}; give bundles names of their own with --bundle NAME={path}"
            )
        bundles[name] = Bundle.from_pretrained(path)
    return bundles


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
        if geometry.sliding_layers or geometry.windowed_layers:
            missing[name] = "transformers' QuantizedCache takes no model with sliding-window layers"
            continue
        if not setting.installed:
            missing[name] = f"{setting.package} is not installed (pip install {setting.package})"
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
        with _bounded_waits():
            for _ in range(2):
                cache.update(tokens, tokens, layer)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{setting.package} is installed but cannot quantise here: {type(error).__name__}: {error}. It may need a C++ "
            "compiler the first time; install one, or leave the row out"
        ) from error
    finally:
        os.environ["PATH"] = path


@contextmanager
def _bounded_waits() -> Iterator[None]:
    """Let nothing that PyTorch builds wait for another build for ever, as it does where a killed one left its lock."""
    unbounded = FileBaton.wait
    FileBaton.wait = _wait  # pyright: ignore[reportAttributeAccessIssue]  # a parameter of another name
    try:
        yield
    finally:
        FileBaton.wait = unbounded


def _wait(baton: FileBaton) -> None:
    """Wait for a build to end, and say so; raises InputError where its lock has been there for too long."""
    path, told = Path(baton.lock_file_path), False
    while path.exists():
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return
        if age > _LOCK_SECONDS:
            raise InputError(
                f"an extension is being built by another process, or was when that was killed: its lock {path} has been there "
                f"for {age:,.0f} seconds; if nothing builds, delete that file and try again"
            )
        if not told:
            print(f"waiting for another process to build an extension (lock: {path})", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)
