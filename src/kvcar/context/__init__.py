"""Caches on disk: one file each, entropy-coded. Above ``cache``, which knows nothing of files.

Names are loaded when first used, so that the entropy of codes (``kvcar.context.entropy``) needs no cache.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stored import StoredContext as StoredContext
    from .stored import check_store as check_store
    from .stored import load_context as load_context
    from .stored import read_context as read_context
    from .stored import save_context as save_context

__all__ = ["StoredContext", "check_store", "load_context", "read_context", "save_context"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".stored", __name__), name)
