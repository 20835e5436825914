"""kvcar: a several times smaller KV cache for any Hugging Face causal language model, with its cost measured.

Names are loaded when first used, so that ``import kvcar`` brings in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .cache.attach import Attachment as Attachment
    from .cache.attach import attach as attach
    from .cache.attach import detach as detach
    from .cache.cache import KVCarCache as KVCarCache
    from .context import read_context as read_context
    from .errors import KVCarError as KVCarError
    from .evaluate.fidelity import Fidelity as Fidelity
    from .evaluate.fidelity import evaluate as evaluate
    from .evaluate.fidelity import measure_fidelity as measure_fidelity
    from .evaluate.recall import Recall as Recall
    from .evaluate.recall import evaluate_recall as evaluate_recall
    from .fit.fit import fit as fit
    from .fit.fit import fit_bundles as fit_bundles
    from .fit.fit import lossless as lossless
    from .fit.options import FitOptions as FitOptions
    from .fit.options import Structure as Structure
    from .models.load import load_model as load_model
    from .plan import Block as Block
    from .plan import CacheConfig as CacheConfig
    from .plan import Plan as Plan
    from .text import read_text as read_text
    from .text import token_windows as token_windows
    from .version import __version__ as __version__

_HOMES = {
    "Attachment": ".cache.attach",
    "Block": ".plan",
    "Bundle": ".bundle",
    "CacheConfig": ".plan",
    "Fidelity": ".evaluate.fidelity",
    "FitOptions": ".fit.options",
    "KVCarCache": ".cache.cache",
    "KVCarError": ".errors",
    "Plan": ".plan",
    "Recall": ".evaluate.recall",
    "Structure": ".fit.options",
    "__version__": ".version",
    "attach": ".cache.attach",
    "detach": ".cache.attach",
    "evaluate_recall": ".evaluate.recall",
    "fit_bundles": ".fit.fit",
    "lossless": ".fit.fit",
    "load_model": ".models.load",
    "measure_fidelity": ".evaluate.fidelity",
    "read_context": ".context",
    "read_text": ".text",
    "token_windows": ".text",
}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "Attachment",
    "Block",
    "Bundle",
    "CacheConfig",
    "Fidelity",
    "FitOptions",
    "KVCarCache",
    "KVCarError",
    "Plan",
    "Recall",
    "Structure",
    "__version__",
    "attach",
    "detach",
    "evaluate",
    "evaluate_recall",
    "fit",
    "fit_bundles",
    "load_model",
    "lossless",
    "measure_fidelity",
    "read_context",
    "read_text",
    "token_windows",
]


# Packages that can be called as the function of their name: bound as packages, however they are imported first.
_CALLABLE = ("evaluate", "fit")


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcar' has no attribute {name!r}")
    home = _HOMES[name]
    if home.startswith(".cache"):
        # Registers how caches are saved and loaded, which the cache itself knows nothing of.
        import_module(".context.stored", __name__)
    return getattr(import_module(home, __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
