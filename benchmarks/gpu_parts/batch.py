"""The largest batch whose cache fits into a share of memory beside the weights: found by trying, beside the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from speed.figures import spread
from speed.runners import FULL, Runner, bundle_runners, full_runner, twin

from kvcar.cache.attach import attach
from kvcar.geometry import BFLOAT16_BYTES
from kvcar.models.geometry import read_geometry
from kvcar.sizes import SizeOf, compressed_size, full_size, what_fits

from . import Figures, Sizes, model

_UNLIMITED_TOKENS = 2**40
_TRIES = 4
_STEP = 0.08
"""By how much a batch is made smaller, or larger, to try again."""


def sizes(rehearse: bool) -> Sizes:
    """The same model; memory for everything but the weights, and tokens of each sequence."""
    own = model.sizes(rehearse)
    shared = {"model": own["model"], "profiles": own["profiles"]}
    if rehearse:
        return {**shared, "memory_bytes": 40_000, "tokens": 140, "steps": 1, "chunk_tokens": 10_000}
    return {**shared, "memory_bytes": 4 * 2**30, "tokens": 4096, "steps": 8, "chunk_tokens": 4096}


@torch.no_grad()
def figures(device: torch.device, sizes: Sizes) -> Iterator[Figures]:
    """See the package."""
    own = model.random_model(device, sizes)
    bundles = model.random_bundles(own, sizes["profiles"])
    geometry = read_geometry(own.config)
    plain = twin(own)
    by_size: dict[str, SizeOf] = {FULL: full_size(geometry)}
    by_size |= {name: compressed_size(each.plan, BFLOAT16_BYTES) for name, each in bundles.items()}
    found: Figures = {"caches": {}}
    with attach(own, next(iter(bundles.values()))):
        for runner in [full_runner(plain), *bundle_runners(own, bundles)]:
            reckoned = what_fits(by_size[runner.name], sizes["memory_bytes"], 1, sizes["tokens"], _UNLIMITED_TOKENS)
            attempt = partial(_try, runner, device=device, sizes=sizes)
            tried, largest = search(max(1, reckoned.largest_batch), attempt)
            found["caches"][runner.name] = {"reckoned": reckoned.largest_batch, "largest": largest, "tried": tried}
            yield found


def search(first: int, attempt: Callable[[int], dict[str, Any] | None]) -> tuple[dict[int, Any], dict[str, Any] | None]:
    """Try batches from the reckoned one: smaller until one fits, larger while it does; all tries and the largest that fitted."""
    tried: dict[int, Any] = {}
    batch, best = first, None
    for _ in range(_TRIES):
        tried[batch] = attempt(batch)
        if tried[batch] is not None:
            best = {"batch": batch, **tried[batch]}
        step = max(1, round(batch * _STEP))
        batch = batch - step if best is None else best["batch"] + step
        if batch < 1 or batch in tried:
            break
    return tried, best


def _try(runner: Runner, batch: int, device: torch.device, sizes: Sizes) -> dict[str, Any] | None:
    """Prefill and decode ``batch`` sequences; None where that takes more memory than there is."""
    ids = model.random_ids(device, sizes, batch, sizes["tokens"] + sizes["steps"])
    runner.cache, runner.fed = runner.new_cache(), 0
    chunk = max(1, sizes["chunk_tokens"] // batch)
    with _limited(device, sizes["memory_bytes"]) as limit:
        try:
            for start in range(0, sizes["tokens"], chunk):
                runner.feed(ids[:, start : min(start + chunk, sizes["tokens"])])
            seconds = runner.decode(ids[:, sizes["tokens"] :])
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            held = runner.held_bytes if runner.fed else 0
            runner.cache = runner.new_cache()
    if held > limit:
        return None
    return {
        "held_bytes": held,
        "step": spread([1000 * each for each in seconds]).as_dict("_ms"),
        "tokens_per_second": batch * len(seconds) / sum(seconds),
    }


@contextmanager
def _limited(device: torch.device, memory_bytes: int) -> Iterator[float]:
    """Let PyTorch take so much memory beside what it has; the bytes that caches may hold where only they can be counted."""
    if device.type != "cuda":
        yield memory_bytes
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (torch.cuda.memory_reserved(device) + memory_bytes) / total), device
    )
    try:
        yield float("inf")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
