"""Encoding whole pages of a layer at an 8B model's shape: Triton's and PyTorch's ways."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from speed.compiled import compiled_kernels
from speed.device import seconds_of
from speed.figures import ratios, spread
from speed.rounds import in_rounds
from speed.synthetic import Shape, coded_plan, layer_geometry, random_bundle
from torch import Tensor

from kvcar.cache.coder import PageCoder
from kvcar.kernels.backend import Backend
from kvcar.kernels.encode import ENCODING, Writer

from . import Figures, Sizes
from .codes import codes_for

_WAYS: tuple[Backend, Backend] = ("triton", "torch")


def sizes(rehearse: bool) -> Sizes:
    """Tokens of a turn."""
    if rehearse:
        return {"shape": [4, 2, 16], "tokens": [64], "rounds": 2, "profiles": ["fast"]}
    return {"shape": [32, 8, 128], "tokens": [64, 2048], "rounds": 9, "profiles": ["fast", "balanced"]}


@torch.no_grad()
def figures(device: torch.device, sizes: Sizes) -> Iterator[Figures]:
    """See the package."""
    found: Figures = {"layers": []}
    for name in sizes["profiles"]:
        geometry = layer_geometry(Shape(*sizes["shape"]), 8192)
        bundle = random_bundle(coded_plan(geometry, codes_for(name, geometry)))
        coder = PageCoder(bundle, device, torch.bfloat16)
        for tokens in sizes["tokens"]:
            parts = [
                (torch.randn(1, tokens, len(unit.unit.slots) * geometry.head_dim, device=device), unit.writer)
                for unit in coder.units
            ]
            found["layers"].append({"profile": name, "tokens": tokens, **_timed(parts, sizes["rounds"], device)})
            found["kernels"] = compiled_kernels()
            yield found


def _timed(parts: list[tuple[Tensor, Writer]], rounds: int, device: torch.device) -> dict[str, Any]:
    turns = {way: partial(_encode, way, parts) for way in _WAYS}
    for turn in turns.values():
        turn()  # compiled before anything counts
    seconds = in_rounds({way: partial(seconds_of, turn, device) for way, turn in turns.items()}, rounds)
    rows = {way: spread([1e6 * each for each in own]).as_dict("_us") for way, own in seconds.items()}
    return {**rows, "triton_to_torch": ratios(seconds["triton"], seconds["torch"]).as_dict()}


def _encode(way: Backend, parts: list[tuple[Tensor, Writer]]) -> None:
    for x, writer in parts:
        ENCODING.choose(way, "any", x, writer)(x, writer)
