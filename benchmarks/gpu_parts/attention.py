"""Attention of a decode step alone at an 8B model's shape, against PyTorch's bfloat16 attention in every way that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
from speed.ceilings import copy_bytes_per_second, matmul_flop_per_second, read_bytes_per_second
from speed.compiled import compiled_kernels
from speed.device import seconds_of
from speed.figures import ratios, spread
from speed.graphs import recorded
from speed.rounds import in_rounds
from speed.synthetic import RandomPast, Shape, coded_plan, layer_geometry, random_bundle
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvcar.kernels.attend import triton as backend

from . import Figures, Sizes, reason
from .codes import codes_for

_DTYPE = torch.bfloat16
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Query heads share KV heads by SDPA's own option, or are rows of their KV head, as they are for kvcar.
_FORMS = ("heads", "rows")
Calls = list[Callable[[], object]]


def sizes(rehearse: bool) -> Sizes:
    """Contexts with batches, and how often everyone has a turn."""
    if rehearse:
        return {
            "shape": [4, 2, 16],
            "lengths": [[150, 1]],
            "rounds": 2,
            "cold_mib": 1,
            "most_copies": 1,
            "profiles": ["fast"],
        }
    lengths = [[8192, 1], [32768, 1], [131072, 1], [8192, 32], [32768, 8]]
    return {
        "shape": [32, 8, 128],
        "lengths": lengths,
        "rounds": 15,
        "cold_mib": 256,
        "most_copies": 16,
        "profiles": ["fast", "balanced"],
    }


def figures(device: torch.device, sizes: Sizes) -> Iterator[Figures]:
    """See the package."""
    bandwidth = {"copy": copy_bytes_per_second(device), "read": read_bytes_per_second(device)}
    found: Figures = {
        "bytes_per_second": bandwidth,
        "matmul_flop_per_second": matmul_flop_per_second(device, _DTYPE),
        "lengths": [],
    }
    yield found
    for tokens, batch in sizes["lengths"]:
        found["lengths"].append(_at(device, sizes, tokens, batch, max(bandwidth.values())))
        found["kernels"] = compiled_kernels()
        yield found


@torch.no_grad()
def _at(device: torch.device, sizes: Sizes, tokens: int, batch: int, bandwidth: float) -> Figures:
    shape = Shape(*sizes["shape"])
    makers: dict[str, Callable[[], tuple[Calls, int]]] = {
        f"kvcar {name}": partial(_compressed, device, sizes, shape, name, tokens, batch) for name in sizes["profiles"]
    }
    for form in _FORMS:
        for name in _BACKENDS:
            makers[f"SDPA {name}, {form}"] = partial(_full, device, sizes, shape, name, form, tokens, batch)
    calls: dict[str, Calls] = {}
    read, failed = {}, {}
    for name, make in makers.items():
        try:
            calls[name], read[name] = make()
            calls[name][0]()  # compiled and chosen before anything counts
        except Exception as error:
            failed[name] = reason(error)
            calls.pop(name, None)
    timed = {"eager": _timed({name: _single(own) for name, own in calls.items()}, sizes, device)}
    if device.type == "cuda":
        graphs = {}
        for name, own in calls.items():
            try:
                graphs[name] = (recorded(own), len(own))
            except Exception as error:
                failed[f"{name}, recorded"] = reason(error)
                torch.cuda.synchronize()
        timed["recorded"] = _timed(graphs, sizes, device)
    return {
        "tokens": tokens,
        "batch": batch,
        "failed": failed,
        **{how: _summary(seconds, read, bandwidth) for how, seconds in timed.items()},
    }


def _compressed(
    device: torch.device, sizes: Sizes, shape: Shape, name: str, tokens: int, batch: int
) -> tuple[Calls, int]:
    geometry = layer_geometry(shape, tokens)
    past = RandomPast(random_bundle(coded_plan(geometry, codes_for(name, geometry))), tokens, batch, _DTYPE, device)
    copies = _copies(sizes, past.bytes_read())
    own: Calls = [partial(backend.attend, past.query(), *past.past(), shape.head_dim**-0.5) for _ in range(copies)]
    return own, past.bytes_read()


def _full(
    device: torch.device, sizes: Sizes, shape: Shape, name: str, form: str, tokens: int, batch: int
) -> tuple[Calls, int]:
    def new(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, shape.head_dim, dtype=_DTYPE, device=device)

    group = shape.query_heads // shape.kv_heads
    query = (shape.query_heads, 1) if form == "heads" else (shape.kv_heads, group)
    size = 2 * batch * shape.kv_heads * tokens * shape.head_dim * _DTYPE.itemsize
    own: Calls = [
        partial(_attend, _BACKENDS[name], new(*query), new(shape.kv_heads, tokens), new(shape.kv_heads, tokens))
        for _ in range(_copies(sizes, size))
    ]
    return own, size


def _attend(own: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(own):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])


def _copies(sizes: Sizes, size: int) -> int:
    """As many as leave no cache anything to hold."""
    return min(sizes["most_copies"], -(-sizes["cold_mib"] * 2**20 // size))


def _single(calls: Calls) -> tuple[Callable[[], object], int]:
    waiting = cycle(calls)
    return lambda: next(waiting)(), 1


def _timed(
    calls: dict[str, tuple[Callable[[], object], int]], sizes: Sizes, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a call, of every round."""
    for call, _ in calls.values():
        call()
    turns = {
        name: (lambda call=call, count=count: seconds_of(call, device) / count) for name, (call, count) in calls.items()
    }
    return in_rounds(turns, sizes["rounds"])


def _summary(seconds: dict[str, list[float]], read: dict[str, int], bandwidth: float) -> dict[str, Any]:
    """Times, and how they compare with the fastest attention of PyTorch."""
    rivals = [name for name in seconds if name.startswith("SDPA")]
    fastest = min(rivals, key=lambda name: median(seconds[name]), default=None)
    rows = {}
    for name, each in seconds.items():
        speed = read[name] / median(each)
        rows[name] = {
            **spread([1e6 * second for second in each]).as_dict("_us"),
            "bytes_read": read[name],
            "bytes_per_second": speed,
            "share_of_bandwidth": speed / bandwidth,
        }
        if fastest is not None:
            rows[name]["ratio_to_fastest"] = ratios(each, seconds[fastest]).as_dict()
    return {"fastest": fastest, "contenders": rows}
