"""kvcar's own options in vLLM's ``--additional-config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import InputError, require

NAME = "kvcar"


@dataclass(frozen=True)
class Options:
    """What ``--additional-config '{"kvcar": {...}}'`` may say.

    Attributes:
        bundle: folder, or id on the hub.
        max_num_batched_tokens: tokens of a pass; None for a window of the bundle's.
        allow_untested: run on versions of vLLM and on devices that kvcar was not tested with.
    """

    bundle: str
    max_num_batched_tokens: int | None = None
    allow_untested: bool = False

    def __post_init__(self) -> None:
        require(str, bundle=self.bundle)
        require(int, optional=True, max_num_batched_tokens=self.max_num_batched_tokens)
        require(bool, allow_untested=self.allow_untested)
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise InputError(f"max_num_batched_tokens must be at least 1, got {self.max_num_batched_tokens}")


def asked_for(config: Any) -> bool:
    """Whether vLLM's config names kvcar."""
    additional = config.additional_config
    return isinstance(additional, Mapping) and NAME in additional


def options_of(config: Any) -> Options:
    """Read the options out of vLLM's config.

    Raises:
        InputError: there are none, or they are not what is expected.
    """
    given = config.additional_config.get(NAME) if asked_for(config) else None
    known = [field.name for field in fields(Options)]
    if not isinstance(given, Mapping) or "bundle" not in given or set(given) - set(known):
        raise InputError(
            f'--additional-config must be \'{{"{NAME}": {{"bundle": "FOLDER or hub id"}}}}\', where {", ".join(known[1:])} '
            f"may be added; got {given!r}"
        )
    return Options(**given)
